"""Real kills beside a run of this process: whom to end, and when.

Only processes below this one are ever looked at: other runs may be on the same machine.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import psutil

PATIENCE_S, LOOK_S = 120.0, 0.005
T = TypeVar("T")


@dataclass
class Kill(Generic[T]):
    """pid : who was ended; before : what was there already, of which nothing may be lost."""

    before: T
    pid: int = 0


def workers(kind: str = "PooledWorker") -> list[int]:
    """Ray's actors of that class."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if kind in " ".join(process.cmdline()[:1]):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def any_worker(before: object) -> int:
    """The first of them."""
    return workers()[0]


@contextmanager
def killing(
    done: Callable[[], T],
    whom: Callable[[T], int] = any_worker,
    by: signal.Signals = signal.SIGKILL,
) -> Iterator[Kill[T]]:
    """In the block ``whom`` is sent ``by`` as soon as ``done`` gives something.

    Fails when the block ends before that, for then nothing was shown.
    """
    kill, over = Kill(done()), threading.Event()

    def look() -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := done()):
            if over.is_set() or time.monotonic() > deadline:
                return
            time.sleep(LOOK_S)
        kill.before, pid = found, whom(found)
        kill.pid = pid
        os.kill(pid, by)

    killer = threading.Thread(target=look)
    killer.start()
    try:
        yield kill
    finally:
        over.set()
        killer.join()
    assert kill.pid, "the run ended before there was anything to lose"
