"""Readers of one process whose rows do not come: each is named, whichever is waited for.

A batch's readers are waited for one after another, so a reader that says only for itself that it is
waited for would be silent as long as the one before it stalls. Here whoever waits looks after all of
them. What a reader says of itself is `remote_rows`' affair.
"""

from __future__ import annotations

import threading
import time
import weakref
from typing import Protocol

# Readers that give up in the same moment end the run with the same line.
SAME_MOMENT_S = 5.0


class Late(Protocol):
    """A reader that may be late."""

    def say_if_late(self, now: float) -> None:
        """Say so, if it is time to; ``now``: `time.monotonic`."""
        ...

    def late(self, now: float) -> str:
        """Rows that should have come, in words; "" when there are none."""
        ...


class Stalls:
    """All readers of a process, as long as somebody has them."""

    def __init__(self) -> None:
        self._readers: list[weakref.ref[Late]] = []
        self._lock = threading.Lock()
        self._last = (-SAME_MOMENT_S, "")

    def add(self, reader: Late) -> None:
        """From now on it is looked after."""
        with self._lock:
            self._readers = [*(ref for ref in self._readers if ref()), weakref.ref(reader)]

    def look(self) -> None:
        """Have every reader that is late say so. In any thread; one at a time does it."""
        if self._lock.acquire(blocking=False):
            try:
                now = time.monotonic()
                for reader in self._alive():
                    reader.say_if_late(now)
            finally:
                self._lock.release()

    def all_late(self) -> str:
        """What is late of all readers; the same words for those that ask in the same moment."""
        with self._lock:
            now = time.monotonic()
            if now - self._last[0] >= SAME_MOMENT_S:
                words = [text for reader in self._alive() if (text := reader.late(now))]
                self._last = (now, "; ".join(words))
            return self._last[1]

    def _alive(self) -> list[Late]:
        return [reader for ref in self._readers if (reader := ref()) is not None]
