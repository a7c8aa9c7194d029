"""``trial_betas``: one pattern a trial, ready to be decoded.

Least squares all (LSA) fits all trials in one model: unbiased, noisy where responses overlap. Least
squares separate (LSS) fits a model a trial, with the other trials as one regressor each condition: steadier
where trials follow within a few seconds (Mumford 2012). Either is worked out block-wise over voxels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import InputError
from raypipe.fmri.glm import separate
from raypipe.fmri.glm.blocks import BUDGET_BYTES, series_blocks, voxels_a_block
from raypipe.fmri.glm.config import GlmConfig
from raypipe.fmri.glm.designs import nuisance_design
from raypipe.fmri.glm.fit import common_voxels
from raypipe.fmri.glm.noise_fit import fit_block
from raypipe.fmri.glm.projection import Projection
from raypipe.fmri.glm.trials import EventColumns, all_design, chosen
from raypipe.fmri.mvpa import Design
from raypipe.fmri.sources import ArraySeries, SeriesSource, Voxels
from raypipe.read.events import Events

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class TrialRun:
    """A run and its events. confounds : (T, k) or None; kept : volumes that are not scrubbed."""

    series: SeriesSource
    events: Events
    confounds: NDArray[np.float64] | None = None
    kept: NDArray[np.int64] | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class TrialBetas:
    """values : (n_voxels, n_trials) float32, run after run, events in order of onset.

    voxels : (n_voxels,) flat indices; labels : (n_trials,) trial types; runs : (n_trials,) 0, 1, ...
    onset_s : (n_trials,); constant, not_finite : (n_voxels,), whose betas are 0 and NaN
    """

    values: NDArray[np.float32]
    voxels: Voxels
    labels: NDArray[np.str_]
    runs: NDArray[np.int64]
    onset_s: Floats
    constant: NDArray[np.bool_]
    not_finite: NDArray[np.bool_]

    def design(self) -> Design:
        """A sample a trial: ``decode(design.samples(betas.values), design, config)``."""
        n = len(self.labels)
        return Design(
            labels=self.labels,
            runs=self.runs,
            blocks=np.arange(n, dtype=np.int64),
            start=np.arange(n + 1, dtype=np.int64),
            volumes=np.arange(n, dtype=np.int64),
        )

    def series(self) -> ArraySeries:
        """Where a searchlight reads them."""
        return ArraySeries(self.values, self.voxels)


def trial_betas(
    runs: Sequence[TrialRun],
    config: GlmConfig,
    *,
    method: Literal["lsa", "lss"],
    keep: Sequence[str] = (),
    others: Literal["condition", "all"] = "condition",
    budget_bytes: int = BUDGET_BYTES,
    out: NDArray[np.float32] | None = None,
) -> TrialBetas:
    """A beta of each trial of the types in ``keep`` (all for none), of the voxels all runs have.

    The other types are modelled as conditions. others : lss only, what stands for the other trials: a
    regressor of each type, or one of all. budget_bytes : for the work; the betas come on top, in
    ``out``, e.g. a map, where given.
    """
    if method not in ("lsa", "lss") or others not in ("condition", "all"):
        raise InputError(f"method {method}, others {others}: give lsa or lss; condition or all")
    voxels = common_voxels([run.series for run in runs])
    trials = [chosen(run.events, tuple(keep)) for run in runs]
    values = _output(out, (len(voxels), sum(map(len, trials))))
    flags = np.zeros((2, len(voxels)), bool)
    lo = 0
    for run, own in zip(runs, trials, strict=True):
        part = values[:, lo : lo + len(own)]
        lo += len(own)
        work, rank, n_values = _worker(run, own, config, method, others)
        n_volumes = run.series.n_volumes if run.kept is None else len(run.kept)
        step = voxels_a_block(n_volumes, rank, n_values, budget_bytes)
        for block in series_blocks(run.series, voxels, step, config, run.kept):
            part[block.place] = 0.0
            part[block.rows] = work(block.values)
            flags[:, block.place] |= (block.constant, block.not_finite)
    values[flags[1]] = np.nan
    return TrialBetas(
        values=values,
        voxels=voxels,
        labels=_of_trials([run.events.trial_type for run in runs], trials).astype(np.str_),
        runs=np.repeat(np.arange(len(runs)), [len(own) for own in trials]).astype(np.int64),
        onset_s=_of_trials([run.events.onset_s for run in runs], trials).astype(np.float64),
        constant=flags[0],
        not_finite=flags[1],
    )


def _worker(
    run: TrialRun, trials: NDArray[np.int64], config: GlmConfig, method: str, others: str
) -> tuple[Callable[[Floats], Floats], int, int]:
    """(series (n, T) -> betas (n, m), rank of the model, float64 values that a voxel takes)."""
    n_volumes = run.series.n_volumes
    columns = EventColumns.of(run.events, n_volumes, config, run.kept)
    nuisance = nuisance_design(n_volumes, config, confounds=run.confounds)
    nuisance = nuisance if run.kept is None else nuisance.rows(run.kept)
    if method == "lss":
        models = separate.Separate.of(columns, trials, nuisance, others)
        k = columns.own.shape[2]
        return (
            lambda values: separate.betas(models, values, config),
            models.base.q.shape[1],
            (10 * k + 4) * len(trials),
        )
    projection = Projection.of(all_design(columns, trials, nuisance).matrix)
    _check(projection, trials, run.events)
    back = projection.back[: len(trials)].T  # (r, m)

    def least_squares_all(values: Floats) -> Floats:
        found = np.empty((len(values), len(trials)))
        for alike in fit_block(values, projection, config):
            found[alike.rows] = alike.theta @ back
        return found

    return least_squares_all, len(back), 2 * len(trials)


def _check(projection: Projection, trials: NDArray[np.int64], events: Events) -> None:
    """Raises InputError for a trial that the design of all trials cannot tell from others."""
    for column, trial in enumerate(trials):
        weights = np.zeros(projection.n_columns)
        weights[column] = 1.0
        if not projection.estimable(weights):
            raise InputError(
                f"trial {column} ({events.trial_type[trial]} at {events.onset_s[trial]:g} s) cannot be "
                "told from the others; two events at one time, or a confound that follows it"
            )


def _of_trials(
    events: Sequence[NDArray[np.generic]], trials: Sequence[NDArray[np.int64]]
) -> NDArray[np.generic]:
    return np.concatenate([own[which] for own, which in zip(events, trials, strict=True)])


def _output(out: NDArray[np.float32] | None, shape: tuple[int, int]) -> NDArray[np.float32]:
    if out is None:
        return np.empty(shape, np.float32)
    if out.shape != shape or out.dtype != np.float32:
        raise InputError(
            f"out has shape {out.shape} and type {out.dtype}, the betas {shape} float32; make it so"
        )
    return out
