"""What cleaning does to one run: all that does not depend on the voxels' values, made once a run.

The order is nilearn's: scrub (interpolate for butterworth), detrend, filter, leave scrubbed volumes
out, remove confounds, standardise. Doing it to voxels is ``series.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import InputError
from raypipe.fmri.clean.config import BUTTERWORTH_ORDER, CleanConfig
from raypipe.fmri.clean.nuisance import Floats, add_cosines, cosine_drift, nuisance_basis
from raypipe.fmri.clean.scrub import Rows, Scrub, censor, interpolate


@dataclass(frozen=True, eq=False, kw_only=True)
class RunPlan:
    """One run's cleaning.

    basis : (m, rank) orthonormal confounds after filtering, or None
    sos : (n_sections, 6), no sections for no butterworth filter; edge : rows of odd extension
    """

    scrub: Scrub
    detrend: bool
    sos: Floats
    zi: Floats
    edge: int
    basis: Floats | None

    @property
    def changes_nothing(self) -> bool:
        """Whether every volume comes out as it went in (standardising is not in the plan)."""
        scrubs = self.scrub.fill.size or len(self.scrub.keep) < len(self.scrub.enter)
        removes = self.basis is not None and self.basis.shape[1] > 0
        return not (scrubs or self.detrend or len(self.sos) or removes)


def plan_run(
    config: CleanConfig, n_volumes: int, confounds: Floats | None, kept: Rows | None
) -> RunPlan:
    """The cleaning of a run of ``n_volumes``.

    confounds : (n_volumes, k) finite, or None; kept : volumes that are not scrubbed, or None for all
    """
    butterworth = config.filter == "butterworth"
    if config.filter == "cosine":
        cosines = cosine_drift(n_volumes, config.high_pass_hz or 0.0, 1.0 / config.sampling_hz())
        confounds = add_cosines(confounds, cosines)
    scrub = (
        interpolate(
            n_volumes, kept, extrapolate=config.extrapolate, which=config.scrub_interpolation
        )
        if butterworth
        else censor(n_volumes, kept)
    )
    sos = butterworth_sections(config) if butterworth else np.empty((0, 6))
    edge = extension(sos) if butterworth else 0
    if butterworth and len(scrub.enter) <= edge:
        raise InputError(
            f"the run has {len(scrub.enter)} volumes; a butterworth filter of order "
            f"{BUTTERWORTH_ORDER} needs more than {edge}: clean it without filter, or with cosine"
        )
    basis = None
    if confounds is not None:
        basis = nuisance_basis(
            confounds,
            scrub,
            detrend=config.detrend,
            sos=sos if butterworth else None,
            standardize=config.standardize_confounds,
            t_r_s=config.t_r_s or 1.0,
        )
    zi = _start(sos) if butterworth else np.empty((0, 2))
    return RunPlan(scrub=scrub, detrend=config.detrend, sos=sos, zi=zi, edge=edge, basis=basis)


def butterworth_sections(config: CleanConfig) -> Floats:
    """Second-order sections (n, 6) of the filter with ``config``'s cutoffs."""
    from scipy import signal  # slow to import, and not needed without a filter

    cutoffs = [hz for hz in (config.high_pass_hz, config.low_pass_hz) if hz is not None]
    kind = "band" if len(cutoffs) == 2 else "high" if config.low_pass_hz is None else "low"
    sos: NDArray[np.float64] = signal.butter(
        BUTTERWORTH_ORDER,
        cutoffs if kind == "band" else cutoffs[0],
        btype=kind,
        output="sos",
        fs=config.sampling_hz(),
    )
    return sos


def _start(sos: Floats) -> Floats:
    """The filter's state where a series of ones has settled."""
    from scipy import signal

    zi: Floats = signal.sosfilt_zi(sos)
    return zi


def extension(sos: Floats) -> int:
    """Rows by which scipy's sosfiltfilt extends a series at each end: three filter lengths."""
    unused = min(int((sos[:, 2] == 0).sum()), int((sos[:, 5] == 0).sum()))
    return 3 * (2 * len(sos) + 1 - unused)
