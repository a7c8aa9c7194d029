"""One block of voxels under its noise model: ordinary residuals -> noise -> generalised least squares.

Voxels of one AR(1) coefficient share one small matrix; what is made of series is made for all at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from raypipe.fmri.glm.config import GlmConfig
from raypipe.fmri.glm.noise import Bins, Moments, about, coefficient_bins, explained_wholly, moments
from raypipe.fmri.glm.projection import Projection

Floats = NDArray[np.float64]


class Alike(NamedTuple):
    """Voxels of one noise coefficient.

    rows : (m,) of the block; theta : (m, r) coordinates of the fit; dispersion : (m,) noise variance
    inverse : (r, r), the coordinates' covariance at a dispersion of 1
    """

    rows: NDArray[np.intp]
    theta: Floats
    dispersion: Floats
    inverse: Floats


def fit_block(
    values: Floats, projection: Projection, config: GlmConfig, mean: float = 0.0
) -> Iterator[Alike]:
    """values : (n, T); mean : of the residuals of all voxels, which nilearn takes as their centre."""
    theta, residual = projection.split(values)
    sums = moments(residual)
    sums.square[explained_wholly(sums.square, values)] = 0.0
    products = residual @ projection.lagged  # (n, r)
    bins = noise_bins(residual, sums, config, mean)
    for number in np.unique(bins):
        rows = np.flatnonzero(bins == number)
        yield _generalised(rows, number / config.bins, theta, products, sums, projection)


def noise_bins(residual: Floats, sums: Moments, config: GlmConfig, mean: float) -> Bins:
    """(n,) numbers of the voxels' noise coefficients; 0 throughout for white noise."""
    if config.noise == "ols":
        return np.zeros(len(residual), np.int64)
    n_volumes = residual.shape[1]
    square, lagged = about(mean, residual, sums)
    return coefficient_bins(square, lagged, n_volumes, config.bins)


def _generalised(
    rows: NDArray[np.intp],
    rho: float,
    theta: Floats,
    products: Floats,
    sums: Moments,
    projection: Projection,
) -> Alike:
    square, lagged, last = (one[rows] for one in sums)
    pull = -rho * products[rows] - rho**2 * np.outer(last, projection.q[-1])  # Q'Ve
    inverse = linalg.inv(projection.noise_gram(rho))
    step = pull @ inverse
    energy = (1 + rho**2) * square - 2 * rho * lagged - rho**2 * last**2  # e'Ve
    left = np.maximum(energy - np.einsum("nr,nr->n", pull, step), 0.0)
    degrees = len(projection.q) - projection.n_columns
    return Alike(rows, theta[rows] + step, left / degrees, inverse)
