"""Each event's own response: the regressors of trial-wise betas.

The convolution is nilearn's and linear in events, so the regressor of any set of trials is the sum of
theirs, and no design has to be convolved anew for each trial.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from nilearn.glm import first_level
from numpy.typing import NDArray

from raypipe.errors import ConfigError, InputError, UnknownName
from raypipe.fmri.glm.config import GlmConfig
from raypipe.fmri.glm.designs import DesignMatrix, frame_times, nilearn_said
from raypipe.read.events import Events

Floats = NDArray[np.float64]

_PARTS = {"": "hrf", "derivative": "time_derivative", "dispersion": "dispersion_derivative"}


@dataclass(frozen=True, eq=False, kw_only=True)
class EventColumns:
    """k columns of each of m events: the response, and its derivatives where the HRF has them.

    raw : (m, T, k) sampled responses; own : (m, T, k), each derivative made orthogonal to the columns
    before it, as nilearn models it; mix : (m, k, k) with raw = own @ mix
    kinds : (m,) trial types
    """

    raw: Floats
    own: Floats
    mix: Floats
    kinds: NDArray[np.str_]

    @classmethod
    def of(
        cls,
        events: Events,
        n_volumes: int,
        config: GlmConfig,
        kept: NDArray[np.int64] | None = None,
    ) -> EventColumns:
        """Raises InputError for an event without response in the volumes that are kept."""
        raw = _responses(events, n_volumes, config)
        kinds = events.trial_type.astype(np.str_)
        whole = np.linalg.norm(raw[:, :, 0], axis=1)
        if not whole.all():
            raise _silent(events, int(np.flatnonzero(whole == 0)[0]), n_volumes)
        own, mix = orthogonal(raw)
        if kept is not None:
            raw, own = raw[:, kept], own[:, kept]
            lost = np.linalg.norm(raw[:, :, 0], axis=1) <= 1e-6 * whole
            if lost.any():
                raise _silent(events, int(np.flatnonzero(lost)[0]), len(kept))
        return cls(raw=raw, own=own, mix=mix, kinds=kinds)

    def of_kind(self, kind: str) -> Floats:
        """(T, k) raw columns of all events of a kind together."""
        total: Floats = self.raw[self.kinds == kind].sum(axis=0)
        return total


def chosen(events: Events, keep: tuple[str, ...]) -> NDArray[np.int64]:
    """(m,) which events are trials of their own: those of the types in ``keep``, all for none."""
    kinds = events.trial_type.astype(np.str_)
    missing = sorted(set(keep) - set(kinds.tolist()))
    if missing:
        raise UnknownName.of("trial type", missing[0], kinds.tolist(), "it has no event in a run")
    if kinds.size == 0:
        raise InputError("a run has no event, so no trial; leave the run out")
    return np.flatnonzero(np.isin(kinds, list(keep))) if keep else np.arange(len(kinds))


def all_design(
    columns: EventColumns, trials: NDArray[np.int64], nuisance: DesignMatrix
) -> DesignMatrix:
    """Least squares all: columns of each trial, of each other condition, and the nuisance.

    The first columns are the trials' responses, in order; their derivatives come after.
    """
    k = columns.own.shape[2]
    parts = [columns.own[trials, :, j].T for j in range(k)]
    names = [f"trial_{i:05d}_{j}" for j in range(k) for i in range(len(trials))]
    rest = sorted(set(columns.kinds.tolist()) - set(columns.kinds[trials].tolist()))
    for kind in rest:
        parts.append(columns.of_kind(kind))
        names += [f"condition_{kind}_{j}" for j in range(k)]
    return DesignMatrix(
        matrix=np.column_stack((*parts, nuisance.matrix)), names=(*names, *nuisance.names)
    )


def orthogonal(raw: Floats) -> tuple[Floats, Floats]:
    """raw : (m, T, k) -> (own, mix): column j less its projection on those before; raw = own @ mix."""
    if raw.shape[2] == 1:
        return raw, np.ones((len(raw), 1, 1))
    q, r = np.linalg.qr(raw)
    length = np.einsum("mkk->mk", r)
    return q * length[:, np.newaxis], r / length[:, :, np.newaxis]


def _responses(events: Events, n_volumes: int, config: GlmConfig) -> Floats:
    """(m, n_volumes, k)."""
    times = frame_times(n_volumes, config)
    with nilearn_said():
        one_each = [
            [
                first_level.compute_regressor(
                    ([onset], [duration], [1.0]), kernel, times, min_onset=config.min_onset_s
                )[0][:, 0]
                for kernel in _kernels(config)
            ]
            for onset, duration in zip(events.onset_s, events.duration_s, strict=True)
        ]
    return np.array(one_each).transpose(0, 2, 1).copy()


def _kernels(config: GlmConfig) -> list[object]:
    """nilearn's functions of the HRF and its derivatives."""
    family, *extra = config.hrf.split(" + ")
    if family == "fir":
        raise ConfigError("hrf fir has no single value a trial; choose glover or spm for trials")
    return [getattr(first_level, f"{family}_{_PARTS[part]}") for part in ("", *extra)]


def _silent(events: Events, which: int, n_volumes: int) -> InputError:
    return InputError(
        f"trial {which} ({events.trial_type[which]} at {events.onset_s[which]:g} s) has no response "
        f"within the run's {n_volumes} volumes; leave the event out, or check its onset"
    )
