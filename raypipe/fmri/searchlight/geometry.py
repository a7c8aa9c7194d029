"""Spheres of voxels around centres, within a mask; pure geometry.

A sphere holds the mask's voxels whose centres lie within a radius in millimetres, so it is one of
space, not of the grid: anisotropic and oblique voxels are counted as they lie.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import ConfigError, InputError
from raypipe.fmri.masks import Grid, Voxels

# A voxel at the radius itself is inside, whatever the affine's rounding.
_SLACK = 1 + 1e-9


def sphere_offsets(grid: Grid, radius_mm: float) -> NDArray[np.int64]:
    """(n, 3) steps (i, j, k) from a voxel to those within ``radius_mm`` of it, itself included."""
    if not radius_mm > 0 or not np.isfinite(radius_mm):
        raise ConfigError(f"radius_mm {radius_mm} is not above 0; 6 to 12 mm is usual")
    axes = grid.affine[:3, :3]
    # farthest whole steps along each axis: rows of the inverse bound what a ball can reach
    reach = np.floor(radius_mm * _SLACK * np.linalg.norm(np.linalg.inv(axes), axis=1) + 1e-9)
    reach = np.minimum(reach, np.array(grid.shape) - 1).astype(np.int64)
    ranges = [np.arange(-r, r + 1) for r in reach]
    steps = np.stack(np.meshgrid(*ranges, indexing="ij")).reshape(3, -1)
    inside = ((axes @ steps) ** 2).sum(axis=0) <= radius_mm**2 * _SLACK
    return np.ascontiguousarray(steps[:, inside].T)


@dataclass(frozen=True, eq=False)
class Spheres:
    """Sphere i holds members[start[i]:start[i + 1]], places in ``voxels``, ascending.

    voxels : (n,) flat indices of all that some sphere holds, ascending
    """

    voxels: Voxels
    start: NDArray[np.int64]
    members: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.start) - 1

    def of(self, i: int) -> NDArray[np.int32]:
        """Places of sphere i's voxels in ``voxels``."""
        return self.members[self.start[i] : self.start[i + 1]]


def inside_mask(mask: Voxels, grid: Grid) -> NDArray[np.bool_]:
    """(x * y * z,) where the mask is."""
    n = int(np.prod(grid.shape))
    if mask.size == 0 or mask.min() < 0 or mask.max() >= n:
        raise InputError(f"the mask of {mask.size} voxels does not lie in a grid of {grid.shape}")
    inside = np.zeros(n, bool)
    inside[mask] = True
    return inside


def spheres(
    centres: Voxels, offsets: NDArray[np.int64], inside: NDArray[np.bool_], grid: Grid
) -> Spheres:
    """The spheres around ``centres`` (flat indices). offsets, inside : of the functions above."""
    ijk = np.stack(np.unravel_index(centres, grid.shape), axis=1)
    at = ijk[:, np.newaxis] + offsets  # (n_centres, n_offsets, 3)
    valid = np.logical_and.reduce((at >= 0) & (at < np.array(grid.shape)), axis=2)
    strides = np.array([grid.shape[1] * grid.shape[2], grid.shape[2], 1])
    flat = at @ strides
    valid[valid] = inside[flat[valid]]
    count = valid.sum(axis=1)
    # offsets stand in flat order, so each sphere's voxels are ascending
    held = flat[valid]
    seen = np.zeros(inside.size, bool)  # marking them is faster than sorting
    seen[held] = True
    voxels = np.flatnonzero(seen).astype(np.int64)
    place = np.empty(inside.size, np.int32)
    place[voxels] = np.arange(len(voxels))
    start = np.concatenate(([0], np.cumsum(count))).astype(np.int64)
    return Spheres(voxels, start, place[held])


def voxels_at_most(
    centres: Voxels, offsets: NDArray[np.int64], inside: NDArray[np.bool_], grid: Grid
) -> int:
    """A bound of how many voxels the spheres hold: those in the box around all of them."""
    ijk = np.stack(np.unravel_index(centres, grid.shape))
    low = np.maximum(ijk.min(axis=1) + offsets.min(axis=0), 0)
    high = ijk.max(axis=1) + offsets.max(axis=0) + 1
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    return int(np.count_nonzero(inside.reshape(grid.shape)[box]))
