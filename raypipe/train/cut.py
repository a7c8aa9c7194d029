"""How a rank's rows of a step are cut into micro batches: numbers only, before any row is read.

Two things ask for more than "at most ``batch_size`` rows":

- SyncBN: every forward pass is an exchange between all ranks. Ranks with one row more or less must
  then make the same number of them, or one waits for ever (``in_step``). And a row that only keeps a
  rank busy would enter everybody's statistics, so no rank may be without a row of its own.
- Batch norm on maps of one pixel has no statistics of a single row: two at ``least``.

What the plan's steps would break is refused before training (`Cut.check`); fewer rows at once under
memory pressure (`n_pieces`) break neither, at the price of a row above the limit.
"""

from __future__ import annotations

from dataclasses import dataclass

from raypipe.errors import ConfigError
from raypipe.stream import deal, split_micro
from raypipe.stream.plan import StreamPlan


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Micro batches of at most ``batch_size`` rows on each of ``world`` ranks.

    in_step : all ranks make as many, as SyncBN needs it. least : rows that the model needs at once.
    """

    batch_size: int
    world: int = 1
    in_step: bool = False
    least: int = 1

    def micros(self, n_rows: int, global_rows: int) -> list[slice]:
        """The pieces of a rank that was dealt ``n_rows`` >= 1 of a step's ``global_rows``."""
        most = self._share(global_rows) if self.in_step else n_rows
        return split_micro(n_rows, -(-most // self.batch_size))

    def widest(self, global_rows: int) -> list[int]:
        """Rows of the rank that has the most, micro batch by micro batch."""
        share = self._share(global_rows)
        return [p.stop - p.start for p in self.micros(share, global_rows)]

    def check(self, plan: StreamPlan) -> None:
        """Raise ConfigError when a step of ``plan`` cannot be cut as the model needs it."""
        for step in sorted({0, plan.steps_per_epoch - 1}):
            global_rows = plan.step_size(step)
            for rank in sorted({0, self.world - 1}):  # the most rows, and the fewest
                self._check_rank(global_rows, rank)

    def _check_rank(self, global_rows: int, rank: int) -> None:
        part = deal(global_rows, rank, self.world)
        n = part.stop - part.start
        sizes = [p.stop - p.start for p in self.micros(n, global_rows)] if n else []
        if self.in_step and len(sizes) < len(self.widest(global_rows)):
            raise ConfigError(
                f"train sync_batch_norm=True: a step of {global_rows} rows leaves worker {rank} of"
                f" {self.world} without a row in one of its {len(self.widest(global_rows))} forward"
                " passes, and one that counts nothing would enter all statistics;"
                f" {_OTHER_STEPS}, or leave SyncBN out"
            )
        if sizes and min(sizes) < self.least:
            raise ConfigError(
                f"train batch_size={self.batch_size}: a step of {global_rows} rows over"
                f" {self.world} workers has a micro batch of one row, and this model's batch norm"
                f" needs two (its maps are one pixel there); {_OTHER_STEPS}, or larger crops"
            )

    def _share(self, global_rows: int) -> int:
        return -(-global_rows // self.world)


def n_pieces(n_rows: int, limit: int, *, least: int = 1, widest: int | None = None) -> int:
    """Pieces of a micro batch of ``n_rows`` of which at most ``limit`` are computed at once.

    At least ``least`` rows a piece. ``widest``: the same number on every rank, whose micro batches
    have ``widest`` rows or one fewer; so no more pieces than the rank with fewer has rows.
    """
    if widest is not None:
        return max(1, min(-(-widest // limit), widest - 1))
    return max(1, min(-(-n_rows // limit), n_rows // least))


_OTHER_STEPS = "choose a --batch-size (or --accumulate) that divides the rows differently"
