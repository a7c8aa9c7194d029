"""Confounds of one run -> an orthonormal basis of what is taken out of every voxel.

Confounds go through the same steps as the voxels (scrubbing, detrending, filter), so that removing
them brings no filtered frequency back (Lindquist 2018). The steps are nilearn's, one by one: whether
a redundant confound counts is decided by its rounding error, and only the same order of operations
gives the same answer. Matrices here are (volumes, confounds), as in every confounds table.
"""

from __future__ import annotations

import warnings

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raypipe.errors import InputError, RaypipeWarning
from raypipe.fmri.clean.scrub import Scrub

Floats = NDArray[np.float64]

_EPS = np.finfo(np.float64).eps


def confound_matrix(confounds: ArrayLike | None, n_volumes: int) -> Floats | None:
    """``confounds`` as (T, k) float64; None for none.

    NaN in the first row, where a derivative has no value, becomes the second row's value as in
    nilearn's load_confounds, and a RaypipeWarning says so. Raises InputError for NaN elsewhere.
    """
    if confounds is None:
        return None
    matrix = np.array(confounds, np.float64)
    if matrix.ndim == 1:
        matrix = matrix[:, np.newaxis]
    if matrix.ndim != 2 or len(matrix) != n_volumes:
        raise InputError(
            f"confounds have shape {matrix.shape}, the series {n_volumes} volumes; give one row a "
            "volume: confounds and scan are of different runs or one was cut"
        )
    if matrix.shape[1] == 0:
        return None
    return fill_first_row(matrix)


def fill_first_row(matrix: Floats) -> Floats:
    """``matrix`` (T, k) with NaN of its first row replaced by the second row's values."""
    first = np.isnan(matrix[0])
    if first.any() and len(matrix) > 1:
        matrix = matrix.copy()
        matrix[0, first] = matrix[1, first]
        warnings.warn(
            f"{int(first.sum())} of {matrix.shape[1]} confounds have no value in the first row; it is "
            "taken from the second, as nilearn's load_confounds does",
            RaypipeWarning,
            stacklevel=3,
        )
    if not np.isfinite(matrix).all():
        row, column = np.argwhere(~np.isfinite(matrix))[0]
        raise InputError(
            f"confound column {column} holds {matrix[row, column]} in row {row}; a missing value "
            "counts in the first row only: leave this column out or fill it"
        )
    return matrix


def cosine_drift(n_volumes: int, high_pass_hz: float, t_r_s: float) -> Floats:
    """Discrete cosines slower than ``high_pass_hz``, (n_volumes, n), without the constant."""
    order = min(n_volumes - 1, int(np.floor(2 * n_volumes * high_pass_hz * t_r_s)))
    place = np.arange(n_volumes) + 0.5
    terms = [np.cos(np.pi / n_volumes * place * k) for k in range(1, order + 1)]
    return np.sqrt(2.0 / n_volumes) * np.array(terms).reshape(order, n_volumes).T


def add_cosines(confounds: Floats | None, cosines: Floats) -> Floats | None:
    """``confounds`` with the cosines, unless they hold some already (correlation above 0.9)."""
    if cosines.shape[1] == 0:
        warnings.warn(
            "the run is too short for the cosine filter: no cosine is slower than high_pass_hz, "
            "nothing is filtered",
            RaypipeWarning,
            stacklevel=2,
        )
        return confounds
    if confounds is None:
        return cosines.copy()
    with np.errstate(invalid="ignore", divide="ignore"):  # a constant confound has no correlation
        correlation = np.corrcoef(cosines.T, confounds.T)[: cosines.shape[1], cosines.shape[1] :]
    if (correlation > 0.9).any():
        warnings.warn(
            "the confounds hold cosines already: no further ones are made, high_pass_hz has no effect",
            RaypipeWarning,
            stacklevel=2,
        )
        return confounds
    return np.hstack((confounds, cosines))


def nuisance_basis(
    confounds: Floats,
    scrub: Scrub,
    *,
    detrend: bool,
    sos: Floats | None,
    standardize: bool,
    t_r_s: float,
) -> Floats:
    """Orthonormal (m, rank) that spans the confounds as they are after scrub, detrend and filter.

    sos : (n_sections, 6) of the butterworth filter, or None
    """
    series = _scrubbed(confounds, scrub, t_r_s)
    if detrend and len(series) > 1:
        series = _detrended(series)
    if sos is not None:
        from scipy import signal  # slow to import, here and below: only what needs it does

        for column in series.T:
            column[:] = signal.sosfiltfilt(sos, column)
    return _orthonormal(_scaled(series[scrub.keep], standardize))


def _scrubbed(confounds: Floats, scrub: Scrub, t_r_s: float) -> Floats:
    """The run's confounds on the series' volumes, scrubbed ones interpolated; a copy."""
    series = confounds[scrub.enter]
    if scrub.splined.size:
        from scipy.interpolate import CubicSpline

        kept = scrub.volumes
        spline = CubicSpline(kept * t_r_s, confounds[kept], extrapolate=True)
        series[scrub.splined] = spline(scrub.enter[scrub.splined] * t_r_s)
    return series


def _detrended(series: Floats) -> Floats:
    series = series - series.mean(axis=0)
    trend = np.arange(len(series), dtype=np.float64)
    trend -= trend.mean()
    trend /= np.sqrt((trend**2).sum())
    return series - np.dot(trend, series) * trend[:, np.newaxis]


def _scaled(series: Floats, standardize: bool) -> Floats:
    """Mean 0 and deviation 1, or only a largest magnitude of 1; constants stay finite."""
    if not standardize:
        largest = np.abs(series).max(axis=0)
        largest[largest == 0] = 1
        return series / largest
    if len(series) == 1:
        return series
    series = series - series.mean(axis=0)
    deviation = series.std(axis=0, ddof=1)
    deviation[deviation < _EPS] = 1.0
    return series / deviation


def _orthonormal(confounds: Floats) -> Floats:
    """QR with pivoting; directions that are only rounding error are dropped."""
    from scipy import linalg

    q, r, _ = linalg.qr(confounds, mode="economic", pivoting=True)
    basis: Floats = np.ascontiguousarray(q[:, np.abs(np.diag(r)) > 100.0 * _EPS])
    return basis
