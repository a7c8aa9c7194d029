"""One batch of a `raypipe.stream.gather.Gatherer` on its way: its pieces, and what they wait for.

A slot of the ring is used again when no piece of its batch writes to it any more. So a batch that is
given up is waited for too, but not the readers behind it: these are cancelled first.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, wait
from typing import TYPE_CHECKING

import numpy as np

from raypipe.stream.buffers import Slot
from raypipe.stream.fetch import Fetch

if TYPE_CHECKING:
    import torch


class Job:
    """A batch of ``rows`` (n,) for ``slot``; ``order``: in which their places are read."""

    def __init__(self, slot: Slot, rows: np.ndarray) -> None:
        self.slot, self.rows = slot, rows
        self.order = np.arange(0)
        self.pieces: list[Future[None]] = []
        self.fetches: dict[str, Fetch] = {}
        self.error: Exception | None = None  # it never came to pieces
        self.uploaded: dict[str, torch.Tensor] = {}
        self.left = 0  # pieces that are not whole yet
        self._lock = threading.Lock()

    def last(self) -> bool:
        """One more piece is whole: whether all are now."""
        with self._lock:
            self.left -= 1
            return self.left == 0

    def wait(self) -> None:
        """Until no thread writes to the slot any more. The first error ends it for all pieces: the
        others may wait for a reader that hangs.
        """
        if self._done():  # to look is cheap, to wait is not
            return
        wait(self.pieces, return_when=FIRST_EXCEPTION)
        if not self._done():
            abandon([self])

    def raise_error(self) -> None:
        """Raise what befell the batch or a piece of it; what was only given up for that comes last."""
        if self.error is not None:
            raise self.error
        for piece in sorted(self.pieces, key=_given_up):
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


def _given_up(piece: Future[None]) -> bool:
    return piece.cancelled() or isinstance(piece.exception(), CancelledError)
