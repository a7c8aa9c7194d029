"""A model's work item: one unit, and how many bytes a block of its voxels may take."""

from __future__ import annotations

from dataclasses import dataclass, replace

from raypipe.errors import MemoryBudgetExceeded
from raypipe.fmri.units import Unit
from raypipe.read.runfiles import RunFiles

LEAST_BYTES = 1 << 20
LESS = "take a smaller ROI, fewer --workers, or a larger --max-memory-per-process"


@dataclass(frozen=True, kw_only=True)
class BetaItem:
    """runs : one for trials, all of the subject for conditions; first : place of runs[0] among all."""

    unit: Unit
    runs: tuple[RunFiles, ...]
    first: int
    budget_bytes: int

    @property
    def key(self) -> str:
        return self.unit.unit_id

    def again(self) -> BetaItem:
        """The same unit; one that is recorded as done is not computed again."""
        return self

    def with_less_memory(self) -> BetaItem:
        """With half the bytes a block. Raises MemoryBudgetExceeded at the least."""
        if self.budget_bytes <= LEAST_BYTES:
            raise MemoryBudgetExceeded(
                f"a worker ran out of memory with blocks of {self.budget_bytes >> 10} KiB of "
                f"{self.unit.unit_id}; {LESS}"
            )
        return replace(self, budget_bytes=max(LEAST_BYTES, self.budget_bytes // 2))

    def at_most(self, other: BetaItem) -> BetaItem:
        """No larger blocks than those of ``other``."""
        return replace(self, budget_bytes=min(self.budget_bytes, other.budget_bytes))
