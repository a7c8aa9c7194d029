"""What is saved where memory ends a fit: the last whole step, by whoever can still save it.

- In a micro batch, or between two steps: by the rank whose memory ended. The others wait for its gradients
  and cannot be asked, so their generators are missing: their dropout is drawn anew. torch's own are noted at
  each step's end: alone, the run goes on as if nothing had been, unless its task draws from NumPy's or
  Python's.
- In the validation: by all together, as after an epoch. The checkpoint owes the validation, and the run that
  goes on begins with it.
- In the optimiser's step: nothing. Weights may be half new, on this rank alone; the checkpoint before stays.
- While an epoch's result is noted and saved: nothing. A last that names a best epoch comes after its weights.

When memory ends is ``limit``'s to know, what is in a checkpoint ``saving``'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from raypipe.errors import (
    MemoryBudgetExceeded,
    StoreCorrupt,
    StoreError,
    StoreLocked,
    in_one_line,
)
from raypipe.memory import guard
from raypipe.train import checkpoint, limit
from raypipe.train.context import WorkerContext
from raypipe.train.engine import Engine
from raypipe.train.numbers import StepNumbers
from raypipe.train.result import Progress
from raypipe.train.saving import Saver, writing


class Rescue:
    """For one fit; ``progress`` is of its last whole step, and of the numbers up to it."""

    def __init__(
        self,
        ctx: WorkerContext,
        engine: Engine,
        progress: Progress,
        numbers: StepNumbers,
        saver: Saver,
    ) -> None:
        self._ctx, self._engine, self._progress = ctx, engine, progress
        self._numbers, self._saver = numbers, saver
        self._is_booking = False

    @contextmanager
    def booking(self) -> Iterator[None]:
        """From the first word of an epoch's result to the checkpoint that has all of it. What ends the
        block early leaves it half told.
        """
        self._is_booking = True
        yield
        self._is_booking = False

    def alone(self) -> None:
        """Save without the others; before the first step there is nothing to save.

        A disk that does not take it is told of, not raised: memory ends the run, and in its place an
        error of the disk would have the workers started again.
        """
        self._engine.clear()
        if not self._progress.global_step:
            return
        guard.relieve()
        self._numbers.settle()
        try:
            if self._ctx.world == 1:
                self._saver.save_alone()
            else:
                self._save_once()
        except (StoreError, OSError, ValueError) as error:
            what = f"worker {self._ctx.rank}: the last whole step is not saved"
            self._ctx.say(f"{what}: {type(error).__name__}: {in_one_line(error)}")

    def together(self) -> None:
        """Save with the others, who are at the same place."""
        guard.relieve()
        self._saver.save(best=False)

    def in_update(self, failure: str) -> MemoryBudgetExceeded:
        """What to raise where a step's gradients are whole and its update failed."""
        if not self._engine.moved:
            self.alone()
            return limit.out_of_memory(failure, "no room to scale or clip the gradients")
        return limit.out_of_memory(
            failure,
            "it was in the optimiser's step, so weights may be half new and are not saved;"
            f" {self._newest()}",
        )

    def elsewhere(self, failure: str) -> MemoryBudgetExceeded:
        """What to raise where neither a micro batch nor an update failed."""
        if not self._engine.moved and not self._is_booking:
            self.alone()
        return limit.out_of_memory(failure, "not in a micro batch, which could be halved")

    def _save_once(self) -> None:
        """Several ranks may run out of memory in the same step: the first one saves for all."""
        try:
            with writing(self._ctx):
                if not self._is_saved():
                    self._saver.save_alone()
        except StoreLocked as error:
            self._ctx.say(f"worker {self._ctx.rank}: {error}; it does not wait for that any longer")
        except StoreError:  # a disk without locks
            if self._ctx.is_main:
                self._saver.save_alone()

    def _is_saved(self) -> bool:
        try:
            found = checkpoint.newest(self._ctx.run_dir)
        except StoreCorrupt:
            return False
        return found is not None and self._steps_of(found) == self._progress.global_step

    def _newest(self) -> str:
        try:
            found = checkpoint.newest(self._ctx.run_dir)
        except StoreCorrupt as error:
            return str(error)
        if found is None:
            return "there is no checkpoint yet"
        steps = self._steps_of(found)
        lost = self._progress.global_step - steps
        return f"resume from {found.path}, of {steps} steps ({lost} less than were done)"

    @staticmethod
    def _steps_of(found: checkpoint.Found) -> int:
        return int(found.meta["progress"]["global_step"])
