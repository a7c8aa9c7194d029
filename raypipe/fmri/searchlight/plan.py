"""A searchlight cut into blocks of work: compact lumps of centres whose voxels fit a budget.

Neighbouring spheres share most of their voxels, so a lump is read once for all its spheres. Lumps are
halves of halves of the mask, cut across their longest side. A `Block` is all that a worker has to be
told; plans and blocks are plain data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import ConfigError, InputError, MemoryBudgetExceeded
from raypipe.fmri.masks import Grid, Voxels
from raypipe.fmri.mvpa import MvpaConfig
from raypipe.fmri.searchlight.geometry import (
    Spheres,
    inside_mask,
    sphere_offsets,
    spheres,
    voxels_at_most,
)
from raypipe.units import format_bytes

BUDGET_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class SearchlightConfig:
    """What is decoded from each sphere, and how the work is cut."""

    radius_mm: float
    """Voxels within this distance of the centre."""
    decode: MvpaConfig = field(default_factory=MvpaConfig)
    """Model, folds, scaling, scores, permutations."""
    centres_a_block: int = 256
    """At most; a block is what one worker takes at a time."""
    budget_bytes: int = BUDGET_BYTES
    """For a block's series, patterns and Gram matrices."""

    def __post_init__(self) -> None:
        if not self.radius_mm > 0:
            raise ConfigError(f"radius_mm {self.radius_mm} is not above 0; 6 to 12 mm is usual")
        if self.centres_a_block < 1 or self.budget_bytes < 1:
            raise ConfigError(
                f"centres_a_block {self.centres_a_block} and budget_bytes {self.budget_bytes} must "
                "be above 0"
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class Block:
    """Centres scored together. centres : (n,) flat indices; spheres : theirs, in that order."""

    number: int
    centres: Voxels
    spheres: Spheres

    @property
    def voxels(self) -> Voxels:
        """All voxels to read, flat, ascending."""
        return self.spheres.voxels


@dataclass(frozen=True, eq=False, kw_only=True)
class SearchlightPlan:
    """mask : voxels with data; centres : (n,) flat indices, lump after lump; start : of each lump."""

    grid: Grid
    radius_mm: float
    mask: Voxels
    centres: Voxels
    start: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.start) - 1

    def lumps(self) -> Iterator[Voxels]:
        """Yield each block's centres."""
        for number in range(len(self)):
            yield self.centres[self.start[number] : self.start[number + 1]]

    def blocks(self) -> Iterator[Block]:
        """Yield all blocks, each made when it is asked for."""
        offsets, inside = (
            sphere_offsets(self.grid, self.radius_mm),
            inside_mask(self.mask, self.grid),
        )
        for number, centres in enumerate(self.lumps()):
            own = spheres(centres, offsets, inside, self.grid)
            yield Block(number=number, centres=centres, spheres=own)


def plan_searchlight(
    mask: Voxels,
    grid: Grid,
    config: SearchlightConfig,
    *,
    n_volumes: int,
    n_samples: int,
    centres: Voxels | None = None,
    squares: int = 0,
) -> SearchlightPlan:
    """Blocks for spheres around ``centres`` (all of the mask for None), of the mask's voxels.

    n_volumes : of the series that are read; n_samples : of the design; squares : see `block_bytes`
    Raises MemoryBudgetExceeded when not even one sphere fits the budget.
    """
    offsets, inside = sphere_offsets(grid, config.radius_mm), inside_mask(mask, grid)
    wanted = np.unique(mask if centres is None else centres).astype(np.int64)
    if wanted.size == 0 or not inside[wanted].all():
        raise InputError(
            f"{np.count_nonzero(~inside[wanted])} of {wanted.size} centres lie outside the mask; give "
            "centres within it"
        )

    limit = _Limit(offsets, inside, grid, config, n_volumes, n_samples, squares)
    lumps = [_walk(lump, grid) for lump in _halves(wanted, grid, limit.fits)]
    start = np.concatenate(([0], np.cumsum([len(lump) for lump in lumps]))).astype(np.int64)
    return SearchlightPlan(
        grid=grid,
        radius_mm=config.radius_mm,
        mask=np.unique(mask).astype(np.int64),
        centres=np.concatenate(lumps),
        start=start,
    )


def largest_bytes(
    plan: SearchlightPlan,
    config: SearchlightConfig,
    *,
    n_volumes: int,
    n_samples: int,
    squares: int = 0,
) -> tuple[int, int]:
    """(bytes, voxels) that the largest block takes at most, by the boxes around its spheres."""
    offsets, inside = sphere_offsets(plan.grid, plan.radius_mm), inside_mask(plan.mask, plan.grid)
    voxels = max(voxels_at_most(lump, offsets, inside, plan.grid) for lump in plan.lumps())
    labels = 1 + config.decode.n_permutations
    bound = block_bytes(voxels, len(offsets), n_volumes, n_samples, labels, squares)
    return min(bound, config.budget_bytes), voxels


def block_bytes(
    n_voxels: int,
    sphere: int,
    n_volumes: int,
    n_samples: int,
    n_labels: int = 1,
    squares: int = 0,
) -> int:
    """What scoring a block takes at its peak.

    Series (float32); patterns, and those being scaled (float64); a sphere's patterns, twice, and
    ``squares`` matrices of its voxels (`mvpa.estimators.solver_squares`); Gram matrices; for each
    label vector its samples' labels, predictions and decisions.
    """
    series = n_voxels * (4 * n_volumes + 6 * 8 * n_samples)
    own = 2 * 8 * sphere * n_samples + 8 * squares * sphere**2
    return series + own + 4 * 8 * n_samples**2 + 48 * n_labels * n_samples


@dataclass(frozen=True, eq=False)
class _Limit:
    """What a block may hold."""

    offsets: NDArray[np.int64]
    inside: NDArray[np.bool_]
    grid: Grid
    config: SearchlightConfig
    n_volumes: int
    n_samples: int
    squares: int

    def fits(self, lump: Voxels) -> bool:
        """Raises MemoryBudgetExceeded for a single centre that does not."""
        if len(lump) > self.config.centres_a_block:
            return False
        budget = self.config.budget_bytes
        if self._bytes(voxels_at_most(lump, self.offsets, self.inside, self.grid)) <= budget:
            return True
        need = self._bytes(len(spheres(lump, self.offsets, self.inside, self.grid).voxels))
        if need > budget and len(lump) == 1:
            raise MemoryBudgetExceeded(
                f"one sphere of {self.config.radius_mm:g} mm takes {format_bytes(need)}, the budget "
                f"is {format_bytes(budget)}; give more (block-memory), or a smaller radius"
            )
        return need <= budget

    def _bytes(self, n_voxels: int) -> int:
        labels = 1 + self.config.decode.n_permutations
        return block_bytes(
            n_voxels, len(self.offsets), self.n_volumes, self.n_samples, labels, self.squares
        )


def _halves(centres: Voxels, grid: Grid, fits: Callable[[Voxels], bool]) -> Iterator[Voxels]:
    """Yield lumps that fit, cutting those that do not across their longest side in millimetres."""
    waiting = [centres]
    size = np.linalg.norm(grid.affine[:3, :3], axis=0)  # mm a step along each axis
    while waiting:
        lump = waiting.pop()
        if fits(lump):
            yield lump
            continue
        ijk = np.stack(np.unravel_index(lump, grid.shape))
        axis = int(np.argmax(np.ptp(ijk, axis=1) * size))
        order = np.argsort(ijk[axis], kind="stable")
        half = len(lump) // 2
        waiting += [lump[order[half:]], lump[order[:half]]]


def _walk(lump: Voxels, grid: Grid) -> Voxels:
    """The lump's centres so that each is next to the one before, where it can be: to and fro."""
    i, j, k = np.unravel_index(lump, grid.shape)
    fro_j = np.where(i % 2 == 0, j, -j)
    fro_k = np.where((i + j) % 2 == 0, k, -k)
    return lump[np.lexsort((fro_k, fro_j, i))]
