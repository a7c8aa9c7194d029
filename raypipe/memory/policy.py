"""Decisions about memory, as pure functions of (usage, budget, history): no reading, no clock.

``Limits`` are a budget's three marks, ``decide`` what follows from a usage, ``Throttle`` how a
worker's batch shrinks. Who reads and acts: ``watch`` (a node's processes), ``guard`` (one's own).
"""

from __future__ import annotations

from dataclasses import dataclass

from raypipe.errors import ConfigError
from raypipe.units import format_bytes

MIB = 1024**2
# What a process can still take between the look that condemns it and its end: at 10 GB/s, 25 ms.
MARGIN_BYTES = 256 * MIB
# Between being told and being killed a worker needs room to act in.
APART_BYTES = 64 * MIB
SMALLEST_BUDGET_BYTES = 2 * MARGIN_BYTES
SOFT, RESUME, HARD = 0.80, 0.70, 0.95
# A smaller batch shows in the memory only after the one under way is freed.
HALVE_EVERY = 3


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The marks of one budget, in bytes: resume < soft < hard < budget.

    soft : from here on the process is told to take less, until it is back at resume
    hard : here it is stopped, so that it is gone before the budget
    """

    budget_bytes: int
    resume_bytes: int
    soft_bytes: int
    hard_bytes: int

    @classmethod
    def of(cls, budget_bytes: int) -> Limits:
        """hard = min(budget - 256 MiB, 0.95 budget); soft = 0.80 budget, resume = 0.70 budget.

        Below 1.6 GiB, 0.80 of the budget would be nearer than 64 MiB to hard or above it: there
        soft = hard - 64 MiB, and resume keeps its ratio to soft.
        Raises ConfigError under 512 MiB, where the margin would be more than half of the budget.
        """
        if budget_bytes < SMALLEST_BUDGET_BYTES:
            raise ConfigError(
                f"a budget of {format_bytes(budget_bytes)} is below "
                f"{format_bytes(SMALLEST_BUDGET_BYTES)}: a process is stopped "
                f"{format_bytes(MARGIN_BYTES)} under its budget, so that it never passes it; give "
                "--max-memory-per-process 1GiB or more, or fewer --workers"
            )
        hard = min(budget_bytes - MARGIN_BYTES, int(HARD * budget_bytes))
        soft = min(int(SOFT * budget_bytes), hard - APART_BYTES)
        return cls(
            budget_bytes=budget_bytes,
            resume_bytes=int(soft * RESUME / SOFT),
            soft_bytes=soft,
            hard_bytes=hard,
        )


@dataclass(frozen=True, kw_only=True)
class Decision:
    """pressed : the process has to take less; kill : it has to go."""

    pressed: bool
    kill: bool


def decide(usage_bytes: int, limits: Limits, pressed: bool) -> Decision:
    """What follows from ``usage_bytes``; ``pressed`` is what was decided before."""
    mark = limits.resume_bytes if pressed else limits.soft_bytes
    return Decision(pressed=usage_bytes >= mark, kill=usage_bytes >= limits.hard_bytes)


class Throttle:
    """The batch of one worker: halved under pressure, never grown again, 1 or more.

    What was too much once would be too much again: a batch that grew back would only come and go.
    """

    def __init__(self, full: int) -> None:
        if full < 1:
            raise ConfigError(f"batch {full} is below 1; give 1 or more")
        self.limit = full
        self._pressed_for = 0

    def next(self, pressure: bool) -> int:
        """The batch to go on with, asked at each boundary between two batches.

        Halved at the first boundary under pressure, and again at every third while it lasts.
        """
        if not pressure:
            self._pressed_for = 0
            return self.limit
        if self._pressed_for % HALVE_EVERY == 0:
            self.limit = max(1, self.limit // 2)
        self._pressed_for += 1
        return self.limit
