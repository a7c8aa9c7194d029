"""One batch of a `raypipe.stream.gather.Gatherer` on its way: its pieces, and what they wait for.

A slot of the ring is used again when no piece of its batch writes to it any more. So a batch that is
given up is waited for too, but not the readers behind it: these are cancelled first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, wait
from typing import TYPE_CHECKING

import numpy as np

from raypipe.errors import together
from raypipe.stream.buffers import Slot
from raypipe.stream.fetch import Fetch, hear

if TYPE_CHECKING:
    import torch

# A batch that has not come is said to be waited for after so long, and again.
FIRST_WORD_S, AGAIN_S = 20.0, 60.0


class Job:
    """A batch of ``rows`` (n,) for ``slot``; ``order``: in which their places are read."""

    def __init__(self, slot: Slot, rows: np.ndarray) -> None:
        self.slot, self.rows = slot, rows
        self.order = np.arange(0)
        self.pieces: list[Future[None]] = []
        self.fetches: dict[str, Fetch] = {}
        self.failures: dict[str, Exception] = {}  # of each source the first, in their order
        self.uploaded: dict[str, torch.Tensor] = {}
        self.left = 0  # pieces that are not whole yet
        self.reading = ""  # the source that a thread came to last
        self._lock = threading.Lock()

    def last(self) -> bool:
        """One more piece is whole: whether all are now."""
        with self._lock:
            self.left -= 1
            return self.left == 0

    def fail(self, source: str, error: Exception) -> None:
        """``error`` befell that source of the batch. In any thread."""
        with self._lock:
            if not isinstance(error, CancelledError):  # given up for another's error
                self.failures.setdefault(source, error)

    def wait(self, stalled: Callable[[float], None]) -> None:
        """Until no thread writes to the slot any more. The first error ends it for all pieces: the
        others may wait for a reader that hangs. What befell the other readers is asked first.

        stalled : told how many seconds it has waited, now and then.
        """
        if not self._done():  # to look is cheap, to wait is not
            self._await(stalled)
        if self.failures:
            for source, error in hear(self.fetches).items():
                self.fail(source, error)
        if not self._done():
            abandon([self])

    def _await(self, stalled: Callable[[float], None]) -> None:
        """All pieces, or the first error."""
        began, pause = time.monotonic(), FIRST_WORD_S
        while True:
            done, left = wait(self.pieces, pause, FIRST_EXCEPTION)
            if not left or any(not piece.cancelled() and piece.exception() for piece in done):
                return
            stalled(time.monotonic() - began)
            pause = AGAIN_S

    def raise_error(self) -> None:
        """Raise what befell the batch first; what befell its other sources too is in the notes."""
        if self.failures:
            raise together(list(self.failures.values()))
        for piece in self.pieces:
            piece.result()

    def cancel(self) -> None:
        """Drop the pieces that no thread has begun, and what the others wait for."""
        for piece in self.pieces:
            piece.cancel()
        for fetch in self.fetches.values():
            fetch.cancel()

    def _done(self) -> bool:
        return all(piece.done() for piece in self.pieces)


def abandon(jobs: Iterable[Job]) -> None:
    """Give batches up: afterwards nothing is written to their slots any more.

    Waits for rows being copied from files here, and about a second for readers, stalled or not
    (`raypipe.stream.reading.Cancellable`).
    """
    jobs = list(jobs)
    for job in jobs:  # all of them first: their seconds are the same one
        job.cancel()
    # One that no thread had begun is never said to be done: no thread may come to it any more.
    wait([piece for job in jobs for piece in job.pieces if not piece.cancelled()])
