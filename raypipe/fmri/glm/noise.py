"""How much of its noise a voxel keeps from one volume to the next: nilearn's AR(1) coefficient."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bins = NDArray[np.int64]

# Residuals smaller than this part of the series (squared) are its rounding error.
_NOTHING_LEFT = 1e-24


class Moments(NamedTuple):
    """Sums over volumes of residuals e (n, T): e[t]^2, e[t] e[t - 1]; and the last volume's e; (n,)."""

    square: Floats
    lagged: Floats
    last: Floats


def moments(residual: Floats) -> Moments:
    """residual : (n, T)."""
    square = np.einsum("nt,nt->n", residual, residual)
    lagged = np.einsum("nt,nt->n", residual[:, 1:], residual[:, :-1])
    return Moments(square, lagged, residual[:, -1].copy())


def about(mean: float, residual: Floats, sums: Moments) -> tuple[Floats, Floats]:
    """``square`` and ``lagged`` of residual - mean, (n,) each, without making that array."""
    if mean == 0.0:
        return sums.square, sums.lagged
    n_volumes, total = residual.shape[1], residual.sum(axis=1)
    square = sums.square - 2 * mean * total + n_volumes * mean**2
    inner = 2 * total - residual[:, 0] - residual[:, -1]
    return square, sums.lagged - mean * inner + (n_volumes - 1) * mean**2


def coefficient_bins(square: Floats, lagged: Floats, n_volumes: int, bins: int) -> Bins:
    """Whole numbers k; the coefficient is k / bins (Yule-Walker, cut off towards 0 as in nilearn).

    square, lagged : of one shape, any; 0 where nothing is left
    """
    rho = np.divide(
        lagged / (n_volumes - 1), square / n_volumes, out=np.zeros_like(square), where=square > 0
    )
    return (rho * bins).astype(np.int64)


def explained_wholly(square: Floats, series: Floats) -> NDArray[np.bool_]:
    """(n,) voxels of which the design leaves rounding error only. series : (n, T)."""
    energy = np.einsum("nt,nt->n", series, series)
    return square <= _NOTHING_LEFT * energy
