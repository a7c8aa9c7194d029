"""Which rows every training step sees, as a pure function of (seed, epoch, step).

The order is a global shuffle of all rows, cut into steps of ``rows_per_step`` rows; the last step
of an epoch holds what remains, so that each row comes exactly once an epoch. A step's rows are
dealt to ranks in one contiguous piece each: the number of workers changes who computes a row, never
when. So a cursor (epoch, step) resumes in the middle of an epoch, with other workers too.

Reading the rows is `raypipe.stream.gather`'s; carrying slices through Ray Data is
`raypipe.cluster`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from raypipe.errors import ConfigError
from raypipe.stream.permutation import KeyedPermutation


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


@dataclass(frozen=True, eq=False)
class StreamPlan:
    """All steps of a training run.

    ``rows`` : (n,) int64, distinct, non-negative: the rows to train on, in any order (the plan
    follows their sorted order, so that two ways to list the same rows make the same run);
    ``rows_per_step``: rows of one optimiser step over all workers and micro batches.
    Raises ConfigError when an argument breaks its rule.
    """

    rows: np.ndarray
    seed: int
    rows_per_step: int
    epochs: int

    def __post_init__(self) -> None:
        rows = np.asarray(self.rows)
        if rows.size == 0:
            raise ConfigError("plan rows: none; training needs at least one valid row")
        if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
            raise ConfigError(f"plan rows: {rows.dtype} {rows.shape}; give a 1-D integer array")
        unique = np.unique(rows).astype(np.int64)
        if unique.size != rows.size or unique[0] < 0:
            raise ConfigError(
                f"plan rows: {rows.size - unique.size} repeated, smallest {unique[0]}; "
                "each row may be listed once, and counts from 0"
            )
        for name in ("rows_per_step", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"plan {name}={getattr(self, name)}: give at least 1")
        if self.seed < 0:
            raise ConfigError(f"plan seed={self.seed}: give a non-negative whole number")
        unique.setflags(write=False)
        object.__setattr__(self, "rows", unique)

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
        """sha256 of the sorted rows: tells whether a checkpoint saw the same training set."""
        return hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest()

    def step_size(self, step: int) -> int:
        """Rows of step ``step`` over all ranks."""
        self._check(Cursor(0, step))
        return min(self.rows_per_step, self.rows.size - step * self.rows_per_step)

    def step_rows(self, epoch: int, step: int) -> np.ndarray:
        """All rows of one step, (step_size,) int64, in stream order."""
        self._check(Cursor(epoch, step))
        first = step * self.rows_per_step
        positions = np.arange(first, first + self.step_size(step), dtype=np.int64)
        return self.rows[KeyedPermutation(self.rows.size, (self.seed, epoch))(positions)]

    def slices(self, rank: int, world: int, start: Cursor | None = None) -> Iterator[StepSlice]:
        """Rank's slices from ``start`` (default: the beginning) to the end of the last epoch."""
        deal(0, rank, world)  # a wrong rank is refused here, not at the first next()
        cursor = start or Cursor()
        if cursor < self.end:
            self._check(cursor)
        return self._slices(rank, world, cursor)

    def _slices(self, rank: int, world: int, cursor: Cursor) -> Iterator[StepSlice]:
        while cursor < self.end:
            rows = self.step_rows(cursor.epoch, cursor.step)
            part = rows[deal(rows.size, rank, world)]
            yield StepSlice(cursor.epoch, cursor.step, int(rows.size), part)
            cursor = cursor.advance(self.steps_per_epoch)

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
