"""Correlation per column, whole or streamed in batches, and its normalisation by a noise ceiling.

All sums are float64, whatever comes in. A column that does not vary has no correlation: NaN, never
0: who averages says how they count. Distribution over ranks belongs to ``train``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raypipe.errors import InputError

Floats = NDArray[np.float64]

# A column whose spread is within rounding of its mean is constant for us: 64 ulp of float64.
_CONSTANT = 64 * np.finfo(np.float64).eps


@dataclass
class PearsonSums:
    """Running moments of ``n_columns`` pairs of columns; holds no rows.

    Batches are merged by Chan's rule (centred sums), so a large mean does not cancel the variance.
    """

    n_rows: int
    mean_x: Floats
    mean_y: Floats
    m2_x: Floats
    m2_y: Floats
    c_xy: Floats

    @classmethod
    def empty(cls, n_columns: int) -> PearsonSums:
        """No rows yet."""
        return cls(0, *(np.zeros(n_columns) for _ in range(5)))

    @classmethod
    def of(cls, x: ArrayLike, y: ArrayLike) -> PearsonSums:
        """Moments of one batch; x, y : (n_rows, n_columns), n_rows >= 1. Raises InputError."""
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if x.ndim != 2 or x.shape != y.shape or x.shape[0] == 0:
            raise InputError(
                f"correlation of arrays of shape {x.shape} and {y.shape}: both must be the same"
                " (n_rows, n_columns) with at least one row"
            )
        mean_x, mean_y = x.mean(0), y.mean(0)
        dx, dy = x - mean_x, y - mean_y
        squares = ((dx * dx).sum(0), (dy * dy).sum(0), (dx * dy).sum(0))
        return cls(x.shape[0], mean_x, mean_y, *squares)

    def add(self, x: ArrayLike, y: ArrayLike) -> None:
        """Take in one more batch; x, y : (n_rows, n_columns). An empty batch changes nothing."""
        if np.shape(x)[0] == 0 and np.shape(x) == np.shape(y):
            return
        self.merge(PearsonSums.of(x, y))

    def merge(self, other: PearsonSums) -> None:
        """Take in another's rows (Chan, Golub and LeVeque 1983)."""
        n = self.n_rows + other.n_rows
        if n == 0:
            return
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        weight = self.n_rows * other.n_rows / n
        self.m2_x = self.m2_x + other.m2_x + dx * dx * weight
        self.m2_y = self.m2_y + other.m2_y + dy * dy * weight
        self.c_xy = self.c_xy + other.c_xy + dx * dy * weight
        self.mean_x = self.mean_x + dx * (other.n_rows / n)
        self.mean_y = self.mean_y + dy * (other.n_rows / n)
        self.n_rows = n

    def correlation(self) -> Floats:
        """Pearson r per column, (n_columns,) in [-1, 1]; NaN where either side is constant."""
        flat = _is_constant(self.m2_x, self.mean_x, self.n_rows)
        flat |= _is_constant(self.m2_y, self.mean_y, self.n_rows)
        with np.errstate(divide="ignore", invalid="ignore"):
            r = self.c_xy / (np.sqrt(self.m2_x) * np.sqrt(self.m2_y))
        return np.where(flat, np.nan, np.clip(r, -1.0, 1.0))


def _is_constant(m2: Floats, mean: Floats, n_rows: int) -> NDArray[np.bool_]:
    return m2 <= n_rows * (_CONSTANT * np.abs(mean)) ** 2


def pearson_from_sums(sums: dict[str, Any]) -> Floats:
    """Pearson r from plain sums that ranks can add up: keys n, x, y, xx, yy, xy (each (V,) but n).

    Plain sums cancel where the mean is far above the spread; responses and predictions here are
    near zero mean. A variance within rounding of zero counts as constant: NaN.
    """
    n = float(sums["n"])
    x, y, xx, yy, xy = (np.asarray(sums[k], np.float64) for k in ("x", "y", "xx", "yy", "xy"))
    if n < 2:
        return np.full(x.shape, np.nan)
    m2_x, m2_y, c_xy = xx - x * x / n, yy - y * y / n, xy - x * y / n
    flat = (m2_x <= _CONSTANT * xx) | (m2_y <= _CONSTANT * yy)
    with np.errstate(divide="ignore", invalid="ignore"):
        r = c_xy / np.sqrt(m2_x * m2_y)
    return np.where(flat, np.nan, np.clip(r, -1.0, 1.0))


@dataclass(frozen=True)
class Normalised:
    """A correlation set against what noise allows; each (n_columns,) float64.

    r_over_ceiling        : r / sqrt(nc), 1 at the ceiling; keeps its sign
    r2_over_ceiling       : max(r, 0)^2 / nc, the Algonauts 2023 score as a fraction
    NaN where r is NaN, or the ceiling is NaN or below ``floor``: there nothing can be explained.
    """

    r_over_ceiling: Floats
    r2_over_ceiling: Floats


def normalised_correlation(r: ArrayLike, nc: ArrayLike, floor: float = 1e-3) -> Normalised:
    """Set ``r`` (V,) against the explainable variance fraction ``nc`` (V,), 0..1.

    Values are not clipped at 1: with few rows r passes the ceiling by chance, and a clip would
    bias every mean downwards. Raises InputError for shapes that differ or nc outside 0..1.
    """
    r, nc = np.asarray(r, np.float64), np.asarray(nc, np.float64)
    if r.shape != nc.shape:
        raise InputError(
            f"{r.shape} correlations, noise ceiling of shape {nc.shape}: one value a vertex"
            " is needed; take the ceiling of the same subject and hemisphere"
        )
    known = nc[np.isfinite(nc)]
    if known.size and (known.min() < 0 or known.max() > 1 + 1e-6):
        raise InputError(
            f"noise ceiling spans {known.min():.3g}..{known.max():.3g}; explainable variance is a"
            " fraction 0..1: divide by 100 if it is in percent"
        )
    usable = np.where(np.isfinite(nc) & (nc >= floor), nc, np.nan)
    return Normalised(r / np.sqrt(usable), np.maximum(r, 0.0) ** 2 / usable)
