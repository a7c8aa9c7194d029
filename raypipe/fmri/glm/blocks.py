"""Blocks of voxels within a byte budget, read and brought to the units of the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import MemoryBudgetExceeded, RaypipeWarning
from raypipe.fmri.glm.config import GlmConfig
from raypipe.fmri.sources import SeriesSource, Voxels
from raypipe.units import format_bytes

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

BUDGET_BYTES = 256 << 20
# More voxels a block gain nothing: products of matrices are at full speed from some hundred rows.
_MOST_VOXELS = 4096


def voxels_a_block(n_volumes: int, rank: int, n_values: int, budget_bytes: int) -> int:
    """How many voxels are worked on at a time.

    A voxel takes its series as read (float32), in the model's units, its fit and residuals (float64),
    some ``rank`` coordinates, and ``n_values`` float64 of results and what leads to them.
    Raises MemoryBudgetExceeded when not even one fits.
    """
    each = _voxel_bytes(n_volumes, rank, n_values)
    n = budget_bytes // each
    if n < 1:
        raise MemoryBudgetExceeded(
            f"one voxel of {n_volumes} volumes takes {format_bytes(each)}, the budget is "
            f"{format_bytes(budget_bytes)}; give more"
        )
    return int(min(n, _MOST_VOXELS))


def block_bytes_at_most(n_volumes: int, n_values: int, budget_bytes: int) -> int:
    """What a block takes, whatever the model's rank: the budget, or less where voxels are small."""
    return min(budget_bytes, _MOST_VOXELS * _voxel_bytes(n_volumes, n_volumes, n_values))


def _voxel_bytes(n_volumes: int, rank: int, n_values: int) -> int:
    return n_volumes * (4 + 3 * 8) + 8 * (6 * rank + n_values)


@dataclass(frozen=True, eq=False)
class SeriesBlock:
    """place : where its voxels stand among all. values : (n, T) float64, usable voxels only.

    usable, constant, not_finite : (m,) of all voxels of the block
    """

    place: slice
    values: Floats
    usable: Flags
    constant: Flags
    not_finite: Flags

    @property
    def rows(self) -> Voxels:
        """Where the usable voxels stand among all."""
        return self.place.start + np.flatnonzero(self.usable)


def series_blocks(
    source: SeriesSource,
    voxels: Voxels,
    step: int,
    config: GlmConfig,
    kept: NDArray[np.int64] | None,
) -> Iterator[SeriesBlock]:
    """Yield all voxels, ``step`` at a time. kept : volumes that are not scrubbed, None for all."""
    small = 0
    for lo in range(0, len(voxels), step):
        raw = source.read(voxels[lo : lo + step])
        raw = raw if kept is None else raw[:, kept]
        finite = np.isfinite(raw).all(axis=1)
        constant = finite & (raw.max(axis=1) == raw.min(axis=1))
        usable = finite & ~constant
        values = raw[usable].astype(np.float64)
        if config.scaling == "percent":
            small += _to_percent(values)
        place = slice(lo, lo + len(raw))
        yield SeriesBlock(place, values, usable, constant, np.logical_not(finite))
    if small:
        warnings.warn(
            f"{small} voxels have a mean below 1 and are divided by 1 instead, as in nilearn: their "
            "effects are no percent of signal; for centred series choose scaling none",
            RaypipeWarning,
            stacklevel=3,
        )


def _to_percent(values: Floats) -> int:
    """In place 100 * (values / mean - 1); how many means were below 1."""
    mean = values.mean(axis=1)
    values /= np.maximum(mean, 1.0)[:, np.newaxis]
    values -= 1.0
    values *= 100.0
    return int((mean < 1.0).sum())
