"""A process's own side of its budget: asked at every boundary between two batches.

``current()`` is the guard of this process, whoever put it there: none, this process itself
(``InProcessGuard``), or the node's watch (``cluster.remote_guard.RemoteGuard``). Work asks it, says
by ``note`` what it does, and calls ``relieve`` when it is told to take less.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from raypipe.errors import MemoryBudgetExceeded
from raypipe.memory.gpu import initialised_cuda
from raypipe.memory.policy import Limits, decide
from raypipe.memory.probe import ENFORCES, Charge, charge
from raypipe.units import format_bytes


class Guard(Protocol):
    """Who keeps a process to its budget. budget_bytes : None where nobody does."""

    @property
    def budget_bytes(self) -> int | None: ...

    def pressure(self) -> bool:
        """Whether less has to be taken from here on; raises MemoryBudgetExceeded at the end."""
        ...

    def note(self, *, batch: int | None = None, phase: str | None = None) -> None:
        """Say what is done, for the verdict: items computed at once, and a word."""
        ...


@runtime_checkable
class CountsReliefs(Protocol):
    """A guard that is told of each ``relieve``."""

    def count_relief(self) -> None: ...


class Log(Protocol):
    """Who writes down what a process does; ``memory.tracker`` does."""

    def update(self, step: int | None = None, phase: str | None = None) -> None: ...


class GivesBack(Protocol):
    """Who holds pages that can be had again: a map of a file, a cache."""

    def give_back(self) -> None: ...


class NoGuard:
    """Nobody watches."""

    budget_bytes: int | None = None

    def pressure(self) -> bool:
        """Never."""
        return False

    def note(self, *, batch: int | None = None, phase: str | None = None) -> None:
        """Nobody listens."""


class InProcessGuard:
    """The process reads itself at each boundary: what grows between two of them is seen late.

    Raises ConfigError for a budget that is too small to be kept.
    """

    def __init__(self, budget_bytes: int, label: str) -> None:
        self.limits = Limits.of(budget_bytes)
        self.label = label
        self._pressed = False
        self._batch: int | None = None
        self._phase = ""
        self._warned = False

    @property
    def budget_bytes(self) -> int:
        """The budget."""
        return self.limits.budget_bytes

    def pressure(self) -> bool:
        """Whether less has to be taken. Raises MemoryBudgetExceeded above the hard limit, when
        emptying all caches did not help; where this is not Linux it warns instead.
        """
        decision = decide(charge().total_bytes, self.limits, self._pressed)
        if decision.kill:
            relieve()
            held = charge()
            decision = decide(held.total_bytes, self.limits, True)
            if decision.kill:
                self._end(held)
        self._pressed = decision.pressed
        return self._pressed

    def note(self, *, batch: int | None = None, phase: str | None = None) -> None:
        """Kept for the message."""
        self._batch = self._batch if batch is None else batch
        self._phase = self._phase if phase is None else phase

    def _end(self, held: Charge) -> None:
        message = self._message(held)
        if ENFORCES:
            raise MemoryBudgetExceeded(message)
        if not self._warned:
            self._warned = True
            print(f"{message} (not Linux: measured only)", file=sys.stderr, flush=True)

    def _message(self, held: Charge) -> str:
        doing = f" in {self._phase}" if self._phase else ""
        batch = f" at batch {self._batch}" if self._batch else ""
        smaller = "a smaller batch or " if self._batch != 1 else ""
        return (
            f"{self.label}{doing}{batch} holds {format_bytes(held.total_bytes)} of its budget of "
            f"{format_bytes(self.limits.budget_bytes)} and stops from "
            f"{format_bytes(self.limits.hard_bytes)} on (anonymous {format_bytes(held.anon_bytes)}, "
            f"pinned {format_bytes(held.pinned_bytes)}, shared tensors "
            f"{format_bytes(held.shm_bytes)}; {format_bytes(held.file_bytes)} of file pages not "
            f"counted); caches were emptied; give {smaller}a larger --max-memory-per-process"
        )


_current: Guard = NoGuard()
_log: Log | None = None
_holders: weakref.WeakSet[GivesBack] = weakref.WeakSet()
_holders_lock = threading.Lock()  # maps are opened by any thread


def current() -> Guard:
    """The guard of this process, for all its threads."""
    return _current


@contextmanager
def guarding(guard: Guard, log: Log | None = None) -> Iterator[Guard]:
    """``guard`` is this process's for the length of the block; log : told of every ``note``."""
    global _current, _log
    before, _current, _log = (_current, _log), guard, log or _log
    try:
        yield guard
    finally:
        _current, _log = before


def note(*, step: int | None = None, batch: int | None = None, phase: str | None = None) -> None:
    """Say where the work stands, for verdicts and the log: at every boundary, some 10 us.

    step : the work's own counter; batch : items computed at once; phase : a word.
    """
    if batch is not None or phase is not None:
        _current.note(batch=batch, phase=phase)
    if _log is not None:
        _log.update(step, phase)


def on_relief(holder: GivesBack) -> None:
    """Have ``holder.give_back`` called by ``relieve``, as long as somebody else holds it."""
    with _holders_lock:
        _holders.add(holder)


def relieve() -> None:
    """Give back what is held without being used: pages of maps, garbage, the heap's freed blocks,
    CUDA's cache.

    Takes milliseconds, more for a large heap: for when memory is short, not for every batch.
    """
    with _holders_lock:
        holders = tuple(_holders)
    for holder in holders:
        holder.give_back()
    gc.collect()
    cuda = initialised_cuda()
    if cuda is not None:
        cuda.empty_cache()
    _trim()
    if isinstance(_current, CountsReliefs):
        _current.count_relief()


def _trim() -> None:
    """glibc keeps freed blocks below the top of its heaps; others have no such call."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
