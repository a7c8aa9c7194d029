"""Weights of overlapping windows, for models that tiles cannot give exactly. Pure.

Window k of an axis counts from ``overlap`` pixels before its tile to as many after it; where two count,
their weights sum to 1. ``linear`` goes from 0 to 1 across the overlap; ``gaussian`` falls off from the
middle of the tile (a standard deviation of 1/8 of the window, as MONAI's), divided by the sum. Seams
get smooth; the result still is not that of the whole image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Literal

import numpy as np

from raypipe.errors import ConfigError
from raypipe.tile.grid import AxisGrid, Tile, TileGrid

Blend = Literal["linear", "gaussian"]
SIGMA = 1 / 8  # of the window


def check_overlap(grid: TileGrid) -> None:
    """Raises ConfigError unless only neighbours overlap."""
    for axis in grid.axes:
        if axis.halo * 2 > axis.tile or axis.halo < 1:
            raise ConfigError(
                f"overlap {axis.halo} with tiles of {axis.tile}: it must be from 1 to half a tile; "
                "take larger tiles or less overlap"
            )


def _raw(axis: AxisGrid, k: int, at: np.ndarray, kind: Blend) -> np.ndarray:
    """Weight of window ``k`` at pixels ``at``, before all are divided by their sum."""
    lo, hi = k * axis.tile - axis.halo, (k + 1) * axis.tile + axis.halo
    centre = at + 0.5
    if kind == "gaussian":
        sigma = SIGMA * (axis.tile + 2 * axis.halo)
        value = np.exp(-0.5 * ((centre - (lo + hi) / 2) / sigma) ** 2)
    else:
        value = np.minimum((centre - lo) / (2 * axis.halo), (hi - centre) / (2 * axis.halo))
    return np.where((centre > lo) & (centre < hi), np.clip(value, 1e-300, 1.0), 0.0)


def axis_weight(axis: AxisGrid, k: int, at: np.ndarray, kind: Blend) -> np.ndarray:
    """(len(at),) float64 weight of window ``k`` at pixels ``at`` of the image, in 0..1."""
    near = [j for j in (k - 1, k, k + 1) if 0 <= j < len(axis)]
    return _raw(axis, k, at, kind) / sum(_raw(axis, j, at, kind) for j in near)


def spread(axis: AxisGrid, k: int) -> slice:
    """Pixels of the image at which window ``k`` counts."""
    lo, hi = k * axis.tile - axis.halo, (k + 1) * axis.tile + axis.halo
    return slice(max(lo, 0), min(hi, axis.size))


def windows(grid: TileGrid, places: Sequence[tuple[int, ...]]) -> Iterator[Tile]:
    """Every window that counts for any of the tiles at ``places``, once, in C order."""
    near = {
        tuple(p + d for p, d in zip(place, step, strict=True))
        for place in places
        for step in product((-1, 0, 1), repeat=len(place))
    }
    for place in sorted(near):
        if all(0 <= p < n for p, n in zip(place, grid.counts, strict=True)):
            yield grid.at(place)


def contribution(
    grid: TileGrid, tile: Tile, region: Sequence[slice], kind: Blend
) -> tuple[tuple[slice, ...], tuple[slice, ...], np.ndarray] | None:
    """What the window of ``tile`` adds to ``region`` of the image: (where in the region, where in the
    window, weight (*space) float32); None for nothing.
    """
    to, of, weight = [], [], np.ones((), np.float64)
    for axis, k, read, part in zip(grid.axes, tile.place, tile.read, region, strict=True):
        counts = spread(axis, k)
        lo, hi = max(counts.start, part.start), min(counts.stop, part.stop)
        if lo >= hi:
            return None
        to.append(slice(lo - part.start, hi - part.start))
        of.append(slice(lo - read.start, hi - read.start))
        weight = weight[..., None] * axis_weight(axis, k, np.arange(lo, hi), kind)
    return tuple(to), tuple(of), weight.astype(np.float32)
