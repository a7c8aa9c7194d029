"""Events and confounds of one run -> the design matrix of conditions, by nilearn.

Designs with a column a trial are ``trials.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from nilearn.glm.first_level import make_first_level_design_matrix
from numpy.typing import ArrayLike, NDArray

from raypipe.errors import InputError, RaypipeWarning
from raypipe.fmri.clean.nuisance import confound_matrix
from raypipe.fmri.glm.config import GlmConfig
from raypipe.read.events import Events

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class DesignMatrix:
    """One run's regressors. matrix : (T, p) float64; names : of the p columns."""

    matrix: Floats
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.matrix.ndim != 2 or self.matrix.shape[1] != len(self.names):
            raise InputError(
                f"a design of shape {self.matrix.shape} with {len(self.names)} names; give one a column"
            )
        if len(set(self.names)) != len(self.names):
            raise InputError("two columns of the design have one name; rename one")
        if not np.isfinite(self.matrix).all():
            raise InputError("the design holds NaN or infinity; fill or leave out that regressor")

    @classmethod
    def of_frame(cls, frame: Any) -> DesignMatrix:
        """Of a DataFrame as nilearn makes it."""
        return cls(matrix=frame.to_numpy(np.float64), names=tuple(map(str, frame.columns)))

    def frame(self) -> Any:
        """As a DataFrame, e.g. for nilearn.plotting.plot_design_matrix."""
        return pd.DataFrame(self.matrix, columns=list(self.names))

    def rows(self, kept: NDArray[np.int64]) -> DesignMatrix:
        """The design of these volumes alone (scrubbing)."""
        return DesignMatrix(matrix=self.matrix[kept], names=self.names)


def frame_times(n_volumes: int, config: GlmConfig) -> Floats:
    """(n_volumes,) seconds at which volumes count as measured."""
    if n_volumes < 2:
        raise InputError(f"a run of {n_volumes} volume(s) cannot be modelled; give a time series")
    first = config.slice_time_ref * config.t_r_s
    last = (n_volumes - 1 + config.slice_time_ref) * config.t_r_s
    return np.linspace(first, last, n_volumes)


def condition_design(
    events: Events,
    n_volumes: int,
    config: GlmConfig,
    *,
    confounds: ArrayLike | None = None,
    confound_names: Sequence[str] | None = None,
) -> DesignMatrix:
    """A regressor for each trial type (or several, by the HRF model), confounds, drift, constant."""
    return _design(_table(events), n_volumes, config, confounds, confound_names)


def nuisance_design(
    n_volumes: int,
    config: GlmConfig,
    *,
    confounds: ArrayLike | None = None,
    confound_names: Sequence[str] | None = None,
) -> DesignMatrix:
    """Confounds, drift and constant alone."""
    return _design(None, n_volumes, config, confounds, confound_names)


def _design(
    events: Any,
    n_volumes: int,
    config: GlmConfig,
    confounds: ArrayLike | None,
    confound_names: Sequence[str] | None,
) -> DesignMatrix:
    matrix = confound_matrix(confounds, n_volumes)
    with nilearn_said():
        frame = make_first_level_design_matrix(
            frame_times(n_volumes, config),
            events,
            hrf_model=config.hrf,
            drift_model=config.drift,
            high_pass=config.high_pass_hz,
            drift_order=config.drift_order,
            fir_delays=list(config.fir_delays),
            add_regs=matrix,
            add_reg_names=None if matrix is None or confound_names is None else [*confound_names],
            min_onset=config.min_onset_s,
        )
    return DesignMatrix.of_frame(frame)


def _table(events: Events) -> Any:
    if len(events.onset_s) == 0:
        raise InputError("the run has no event; model its nuisance alone, or leave it out")
    return pd.DataFrame(
        {
            "onset": events.onset_s,
            "duration": events.duration_s,
            "trial_type": events.trial_type.astype(str),
        }
    )


@contextmanager
def nilearn_said() -> Iterator[None]:
    """What nilearn warns of becomes a RaypipeWarning; that brief events are impulses is no news."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        yield
    for one in heard:
        text = " ".join(str(one.message).split())
        if "null duration" not in text:
            warnings.warn(f"design: {text}", RaypipeWarning, stacklevel=4)
