"""Which rows every training step sees, as a pure function of (seed, epoch, step).

The order is a global shuffle of all rows (or one by windows, for cold disks), cut into steps of
``rows_per_step`` rows; the last step of an epoch holds what remains, so that each row comes exactly
once an epoch. A step's rows are dealt to ranks in one contiguous piece each: the number of workers
changes who computes a row, never when. So a cursor (epoch, step) resumes in the middle of an epoch,
with other workers too.

Reading the rows is `raypipe.stream.gather`'s; carrying slices through Ray Data is
`raypipe.cluster`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from raypipe.errors import ConfigError
from raypipe.stream.permutation import KeyedPermutation
from raypipe.stream.rows import ComputedRows, rows_digest, sorted_rows
from raypipe.stream.window import WindowShuffle

# Rows whose places are computed together: for 16 it costs nearly what it does for these.
_AT_ONCE = 4096


@dataclass(frozen=True, order=True)
class Cursor:
    """The next step to do: ``epoch`` and ``step`` within it, both from 0."""

    epoch: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        if self.epoch < 0 or self.step < 0:
            raise ConfigError(f"cursor ({self.epoch}, {self.step}): epoch and step count from 0")

    def advance(self, steps_per_epoch: int) -> Cursor:
        """The cursor one step on; after an epoch's last step, the start of the next epoch."""
        if self.step + 1 < steps_per_epoch:
            return Cursor(self.epoch, self.step + 1)
        return Cursor(self.epoch + 1, 0)


@dataclass(frozen=True, eq=False)
class StepSlice:
    """One rank's part of one step: ``rows`` (n,) int64 of the step's ``global_rows`` rows.

    ``global_rows`` is the true size of the step over all ranks (the last of an epoch is smaller);
    ``rows`` may be empty.
    """

    epoch: int
    step: int
    global_rows: int
    rows: np.ndarray

    @property
    def cursor(self) -> Cursor:
        """Where in the stream this slice lies."""
        return Cursor(self.epoch, self.step)


@dataclass(frozen=True, eq=False, init=False)
class StreamPlan:
    """All steps of a training run.

    ``rows`` : distinct, non-negative rows to train on, in any order, (n,) ints, or a ``range`` or
    `SplitRows`, which take no memory. The plan follows their sorted order, so that two ways to list
    the same rows make the same order; it keeps them as (n,) int64 or computes them.
    ``rows_per_step``: rows of one optimiser step over all workers and micro batches.
    ``window``: 0 for a global shuffle, else rows of `raypipe.stream.window`'s, for cold disks.
    Raises ConfigError when an argument breaks its rule.
    """

    rows: np.ndarray | ComputedRows
    seed: int
    rows_per_step: int
    epochs: int
    window: int = 0

    def __init__(
        self,
        rows: ArrayLike | range | ComputedRows,
        seed: int,
        rows_per_step: int,
        epochs: int,
        window: int = 0,
    ) -> None:
        for name, value in (("rows_per_step", rows_per_step), ("epochs", epochs)):
            if value < 1:
                raise ConfigError(f"plan {name}={value}: give at least 1")
        for name, value in (("seed", seed), ("window", window)):
            if value < 0:
                raise ConfigError(f"plan {name}={value}: give a non-negative whole number")
        object.__setattr__(self, "rows", sorted_rows(rows))
        object.__setattr__(self, "seed", seed)
        object.__setattr__(self, "rows_per_step", rows_per_step)
        object.__setattr__(self, "epochs", epochs)
        object.__setattr__(self, "window", window)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch, the smaller last one included."""
        return -(-self.rows.size // self.rows_per_step)

    @property
    def end(self) -> Cursor:
        """The cursor of a finished run."""
        return Cursor(self.epochs, 0)

    @cached_property
    def rows_digest(self) -> str:
        """sha256 of the sorted rows, or of what they follow from: tells whether a checkpoint saw the
        same training set.
        """
        return rows_digest(self.rows)

    def step_size(self, step: int) -> int:
        """Rows of step ``step`` over all ranks."""
        self._check(Cursor(0, step))
        return min(self.rows_per_step, self.rows.size - step * self.rows_per_step)

    def step_rows(self, epoch: int, step: int) -> np.ndarray:
        """All rows of one step, (step_size,) int64, in stream order."""
        self._check(Cursor(epoch, step))
        first = step * self.rows_per_step
        return self.span(epoch, first, first + self.step_size(step))

    def span(self, epoch: int, lo: int, hi: int) -> np.ndarray:
        """Rows at positions [lo, hi) of an epoch's order, (hi - lo,) int64."""
        if not 0 <= lo <= hi <= self.rows.size or not 0 <= epoch < self.epochs:
            raise ConfigError(
                f"positions [{lo}, {hi}) of epoch {epoch} are outside the plan of {self.epochs} "
                f"epochs of {self.rows.size} rows"
            )
        return self.rows[self._order(epoch)(np.arange(lo, hi, dtype=np.int64))]

    def in_steps(self, epoch: int, lo: int, hi: int) -> Iterator[np.ndarray]:
        """`span` in pieces of ``rows_per_step``, from position ``lo`` on, the last maybe smaller."""
        step = self.rows_per_step
        each = step * max(1, _AT_ONCE // step)
        for first in range(lo, hi, each):
            rows = self.span(epoch, first, min(first + each, hi))
            yield from (rows[at : at + step] for at in range(0, rows.size, step))

    def _order(self, epoch: int) -> KeyedPermutation | WindowShuffle:
        key = (self.seed, epoch)
        if self.window:
            return WindowShuffle(self.rows.size, self.window, key)
        return KeyedPermutation(self.rows.size, key)

    def slices(self, rank: int, world: int, start: Cursor | None = None) -> Iterator[StepSlice]:
        """Rank's slices from ``start`` (default: the beginning) to the end of the last epoch."""
        deal(0, rank, world)  # a wrong rank is refused here, not at the first next()
        cursor = start or Cursor()
        if cursor < self.end:
            self._check(cursor)
        return self._slices(rank, world, cursor)

    def _slices(self, rank: int, world: int, cursor: Cursor) -> Iterator[StepSlice]:
        # Only the rank's own places are computed: a thousandth of a step of a thousand workers.
        each = max(1, _AT_ONCE // -(-self.rows_per_step // world))
        while cursor < self.end:
            steps = range(cursor.step, min(cursor.step + each, self.steps_per_epoch))
            firsts = [step * self.rows_per_step for step in steps]
            sizes = [min(self.rows_per_step, self.rows.size - first) for first in firsts]
            parts = [deal(size, rank, world) for size in sizes]
            spans = zip(firsts, parts, strict=True)
            places = [np.arange(first + p.start, first + p.stop) for first, p in spans]
            rows = self.rows[self._order(cursor.epoch)(np.concatenate(places))]
            at = 0
            for step, size, part in zip(steps, sizes, parts, strict=True):
                own = part.stop - part.start
                yield StepSlice(cursor.epoch, step, size, rows[at : at + own])
                at += own
            cursor = Cursor(cursor.epoch, steps[-1]).advance(self.steps_per_epoch)

    def _check(self, cursor: Cursor) -> None:
        if cursor.epoch >= self.epochs or cursor.step >= self.steps_per_epoch:
            raise ConfigError(
                f"cursor ({cursor.epoch}, {cursor.step}) is outside the plan of {self.epochs} "
                f"epochs of {self.steps_per_epoch} steps"
            )


def deal(n: int, rank: int, world: int) -> slice:
    """Rank's contiguous piece of ``range(n)``: pieces cover it in rank order, sizes differ by <= 1.

    Raises ConfigError when rank is not in ``range(world)``.
    """
    if world < 1 or not 0 <= rank < world:
        raise ConfigError(
            f"rank {rank} of {world}: ranks count from 0 to the number of workers - 1"
        )
    small, larger = divmod(n, world)
    first = rank * small + min(rank, larger)
    return slice(first, first + small + (rank < larger))


def split_micro(n: int, parts: int) -> list[slice]:
    """``range(n)`` in ``min(n, parts)`` contiguous pieces, none empty, sizes differing by <= 1."""
    if parts < 1:
        raise ConfigError(f"{parts} micro batches: give at least 1")
    count = min(n, parts)
    return [deal(n, index, count) for index in range(count)]
