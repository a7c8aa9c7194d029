"""A searchlight's work item: a block's centres, and how many of them a worker takes at once.

The spheres are made where they are scored: a block of 256 centres is 2 KiB, its spheres a hundred times
that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from raypipe.errors import MemoryBudgetExceeded
from raypipe.fmri.masks import Voxels
from raypipe.fmri.searchlight.score import BlockScores
from raypipe.fmri.units import Unit
from raypipe.read.runfiles import RunFiles

LESS = "take a smaller --radius-mm, fewer --workers, or a larger --max-memory-per-process"


@dataclass(frozen=True, eq=False, kw_only=True)
class LightItem:
    """Block ``number`` of the map ``unit``. centres : (n,) flat indices; at_once : of them."""

    unit: Unit
    number: int
    block_key: str
    runs: tuple[RunFiles, ...]
    centres: Voxels
    at_once: int

    @property
    def key(self) -> tuple[str, int]:
        return (self.unit.unit_id, self.number)

    def again(self) -> LightItem:
        """The same block; one that is on the disk is not computed again."""
        return self

    def with_less_memory(self) -> LightItem:
        """With half the centres at once. Raises MemoryBudgetExceeded at one."""
        if self.at_once == 1:
            raise MemoryBudgetExceeded(
                f"a worker ran out of memory with one sphere of {self.unit.unit_id}; {LESS}"
            )
        return replace(self, at_once=(self.at_once + 1) // 2)

    def at_most(self, other: LightItem) -> LightItem:
        """No more centres at once than ``other``."""
        return replace(self, at_once=min(self.at_once, max(1, other.at_once)))


def merged(number: int, parts: Sequence[BlockScores]) -> BlockScores:
    """Pieces of one block, in order, as the block."""
    first = parts[0]
    return BlockScores(
        number=number,
        centres=np.concatenate([part.centres for part in parts]),
        n_voxels=np.concatenate([part.n_voxels for part in parts]),
        scores={
            name: np.concatenate([part.scores[name] for part in parts]) for name in first.scores
        },
        reached={
            name: np.concatenate([part.reached[name] for part in parts]) for name in first.reached
        },
        null_max={
            name: np.max([part.null_max[name] for part in parts], axis=0) for name in first.null_max
        },
        warning=next((part.warning for part in parts if part.warning), None),
    )
