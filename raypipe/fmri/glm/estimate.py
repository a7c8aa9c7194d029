"""One unit's model: its runs opened, fitted in blocks of voxels, and what came of it.

Reading is ``entries``, fitting ``betas`` and ``fit``, writing ``outputs``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import InputError, MissingInput
from raypipe.fmri.entries import open_entry, source_over
from raypipe.fmri.glm.betas import TrialBetas, TrialRun, trial_betas
from raypipe.fmri.glm.blocks import voxels_a_block
from raypipe.fmri.glm.contrasts import GlmResult
from raypipe.fmri.glm.designs import DesignMatrix, condition_design
from raypipe.fmri.glm.fit import GlmRun, fit_glm
from raypipe.fmri.glm.items import BetaItem
from raypipe.fmri.glm.job import BetasConfig
from raypipe.fmri.inputs import t_r_of
from raypipe.fmri.samples import known_t_r, without_rest
from raypipe.fmri.series import Subject
from raypipe.fmri.sources import SeriesSource
from raypipe.read.confounds import Confounds, read_confounds
from raypipe.read.events import Events, read_events
from raypipe.read.runfiles import RunFiles
from raypipe.store.voxels import VoxelStore


def events_of(cfg: BetasConfig, run: RunFiles) -> Events:
    """What is modelled of ``run``. Raises MissingInput without events.tsv, InputError for none left."""
    if run.events is None:
        raise MissingInput(
            f"{run.name} has no events.tsv beside {run.bold}; give --raw-dir, or an events column"
        )
    found = without_rest(read_events(run.events, cfg.label_column), cfg.rest)
    if not found.onset_s.size:
        raise InputError(f"{run.name} has no event but {', '.join(cfg.rest)}; leave the run out")
    return found


@dataclass(frozen=True, eq=False, kw_only=True)
class OpenRun:
    """One run, open for its model."""

    source: SeriesSource
    store: VoxelStore | None
    way: str
    events: Events
    confounds: Confounds | None

    @property
    def kept(self) -> NDArray[np.int64] | None:
        """Volumes that are not scrubbed."""
        return None if self.confounds is None else self.confounds.kept

    @property
    def regressors(self) -> NDArray[np.float64] | None:
        """(T, k) confounds."""
        return None if self.confounds is None else self.confounds.values


def open_runs(
    cfg: BetasConfig,
    subject: Subject,
    roi: str,
    *,
    use_memmap: bool,
    say: Callable[[str], None],
) -> list[OpenRun]:
    """All runs of ``subject``; scans that are not in the cache are unpacked."""
    opened = []
    for run, scan, regions in zip(subject.runs, subject.scans, subject.regions, strict=True):
        if roi in regions.bad:
            raise InputError(regions.bad[roi])
        voxels = regions.voxels[roi]
        step = voxels_a_block(scan.n_volumes, 20, 0, cfg.budget_bytes())
        store, way = open_entry(
            cfg,
            scan,
            regions.brain,
            voxels,
            reads=1 + len(voxels) // step,
            use_memmap=use_memmap,
            say=say,
        )
        opened.append(
            OpenRun(
                source=source_over(scan, store, voxels),
                store=store,
                way=way,
                events=events_of(cfg, run),
                confounds=read_confounds(run, cfg.confounds),
            )
        )
    return opened


def trials_of(cfg: BetasConfig, item: BetaItem, subject: Subject, run: OpenRun) -> TrialBetas:
    """A beta a trial of one run."""
    one = TrialRun(series=run.source, events=run.events, confounds=run.regressors, kept=run.kept)
    return trial_betas(
        [one],
        cfg.model(known_t_r(t_r_of(cfg, subject.scans))),
        method="lsa" if cfg.method == "lsa" else "lss",
        keep=cfg.keep,
        others=cfg.others,
        budget_bytes=item.budget_bytes,
    )


def conditions_of(
    cfg: BetasConfig, item: BetaItem, subject: Subject, runs: Sequence[OpenRun]
) -> GlmResult:
    """Contrasts over all runs."""
    model = cfg.model(known_t_r(t_r_of(cfg, subject.scans)))
    designs = [
        condition_design(
            run.events,
            run.source.n_volumes,
            model,
            confounds=run.regressors,
            confound_names=None if run.confounds is None else run.confounds.names,
        )
        for run in runs
    ]
    asked: dict[str, Any] = dict(cfg.contrasts()) or _each_type(runs, designs)
    modelled = [
        GlmRun(series=run.source, design=design, kept=run.kept)
        for run, design in zip(runs, designs, strict=True)
    ]
    return fit_glm(modelled, asked, model, budget_bytes=item.budget_bytes)


def _each_type(
    runs: Sequence[OpenRun], designs: Sequence[DesignMatrix]
) -> dict[str, list[NDArray[np.float64]]]:
    """Trial type -> weights a run: 1 for its own column, which a run without such a trial has not."""
    kinds = reduce(np.union1d, [run.events.trial_type.astype(str) for run in runs])
    return {
        str(kind): [np.array([float(name == kind) for name in design.names]) for design in designs]
        for kind in kinds
    }
