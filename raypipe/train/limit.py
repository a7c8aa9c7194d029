"""How many rows are computed at once: fewer when memory is short, and not more again.

Two causes halve it. Pressure: the process's guard, asked before each optimiser step, says that it
is near its budget. And a CUDA device that ran out of memory: what failed is then computed again.
The rows of a step stay the same, so the run does; only more, smaller micro batches are computed.

The decision is `raypipe.memory.policy`'s, the reading `raypipe.memory.guard`'s.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

import torch

from raypipe.errors import MemoryBudgetExceeded
from raypipe.memory import guard
from raypipe.memory.policy import Throttle
from raypipe.train.context import WorkerContext

T = TypeVar("T")

# CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED, the runtime's own, and
# NCCL's: Cuda failure 2 'out of memory' (without a number in older ones).
_LIBRARY = re.compile(
    r"\b[A-Z]+_STATUS_\w*ALLOC\w*|CUDA (driver )?error: out of memory"
    r"|Cuda failure (\d+ )?'out of memory'"
)


class BatchLimit:
    """The limit of one worker. ``full``: the micro batch asked for; ``start``: one already in force.

    Each change is told once, to people (`WorkerContext.say`) and to the guard.
    """

    def __init__(self, full: int, start: int | None, ctx: WorkerContext) -> None:
        self.full, self._ctx = full, ctx
        self._throttle = Throttle(full if start is None else max(1, min(full, start)))
        guard.note(batch=self.rows, phase="train")
        if self.rows < full:
            self._say("an earlier worker outgrew its memory")

    @property
    def rows(self) -> int:
        """Rows to compute at once."""
        return self._throttle.limit

    def at_boundary(self) -> None:
        """Ask the guard, between two optimiser steps. Raises what the guard raises."""
        before = self.rows
        self._throttle.next(guard.current().pressure())
        if self.rows < before:
            guard.relieve()
            self._changed("memory is near its budget")

    def follow(self, rows: int, why: str) -> None:
        """No more than ``rows`` from here on."""
        if rows < self.rows:
            self._throttle = Throttle(max(1, rows))
            self._changed(why)

    def retry(self, act: Callable[[], T], again: Callable[[], T] | None = None) -> T:
        """``act()``; whenever the device runs out of memory in it, half the rows and ``again()``
        (default: ``act``).

        Raises MemoryBudgetExceeded when one row at once is still too many.
        """
        done, outcome = attempt(act)
        while done is None:
            self._halve(outcome)
            done, outcome = attempt(again or act)
        return done[0]

    def _halve(self, failure: str) -> None:
        if self.rows == 1:
            raise out_of_memory(failure, "one row at once is too many for it")
        self._throttle = Throttle(self.rows // 2)
        guard.relieve()  # the failed attempt's tensors are free now: give back their blocks
        self._changed(f"the device ran out of memory ({failure})")

    def _changed(self, why: str) -> None:
        guard.note(batch=self.rows)
        self._say(why)

    def _say(self, why: str) -> None:
        rank = f"worker {self._ctx.rank}: " if self._ctx.world > 1 else ""
        self._ctx.say(
            f"{rank}{why}: micro batches of at most {self.rows} rows from here on, instead of"
            f" {self.full}; the rows of a step stay the same"
        )


def out_of_memory(failure: str, why: str) -> MemoryBudgetExceeded:
    """What a person reads when the device's memory ends training."""
    return MemoryBudgetExceeded(
        f"the device ran out of memory ({failure}): {why}; give --fit-gpu with what the device has,"
        " or a smaller --batch-size with as much more --accumulate: the same run then goes on from"
        " its last checkpoint, or begins again where there is none yet"
    )


def stopped_together(ctx: WorkerContext, steps: int) -> MemoryBudgetExceeded:
    """What the others raise where one worker's memory ended training."""
    return MemoryBudgetExceeded(
        f"another worker ran out of its memory budget; all stopped after {steps} steps, saved in"
        f" {ctx.run_dir / 'last'}: the same command with a larger --max-memory-per-process, or a"
        " smaller --batch-size with as much more --accumulate, goes on from there"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is of a device without memory: torch's own, or one of CUDA's libraries, which
    take their workspaces themselves and which torch passes on as plain RuntimeErrors.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _LIBRARY.search(str(error)) is not None


def short(error: BaseException) -> str:
    """torch's message up to its first full stop: the rest advises on allocator settings."""
    return " ".join(str(error).split()).partition(". ")[0][:200]


def attempt(act: Callable[[], T]) -> tuple[tuple[T] | None, str]:
    """((result,), "") or (None, what the device said).

    The error ends here: its traceback holds the frames, and they the tensors, of what failed.
    """
    try:
        return (act(),), ""
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None, short(error)
