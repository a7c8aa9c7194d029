"""Batches that other processes make, asked for in pieces: bounded by the object store, in order.

What all readers of a run have under way together fits half the object store of the smallest node,
whatever the batch (`divide`): beyond that Ray would write it to disk. Who is asked, and what happens
when nobody answers, is the reader's: `remote_rows`, `decoders`.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from raypipe.errors import MemoryBudgetExceeded
from raypipe.store.catalog import REPLICATE
from raypipe.units import format_bytes

# Who makes a piece gathers it in memory of its own; larger batches are put together by who reads them.
PIECE_BYTES = 64 << 20
MOST_PIECES = 16


@dataclass(frozen=True)
class Share:
    """What one reader may have under way: ``pieces`` of at most ``piece_rows`` rows."""

    piece_rows: int
    pieces: int


def divide(
    store_bytes: int,
    readers: int,
    row_bytes: int,
    batch_rows: int,
    *,
    makers: int = 1,
    instead: str = f"copy the store to their disks ({REPLICATE})",
) -> Share:
    """The share of one of ``readers`` in half an object store of ``store_bytes``.

    A batch is one piece for each of ``makers`` where two of them fit. Raises MemoryBudgetExceeded,
    which names ``instead`` as one way out, when not a row does.
    """
    allowed = store_bytes // 2 // readers
    if row_bytes > allowed:
        raise MemoryBudgetExceeded(
            f"a row of {format_bytes(row_bytes)} from another process, for {readers} reader(s) at "
            f"once, is more than half of an object store of {format_bytes(store_bytes)}; give the "
            f"nodes a larger one (ray start --object-store-memory), fewer --workers, or {instead}"
        )
    most = max(1, min(PIECE_BYTES, allowed // 2) // row_bytes)
    piece_rows = min(-(-batch_rows // makers), most)
    return Share(piece_rows, min(MOST_PIECES * makers, allowed // (piece_rows * row_bytes)))


def smallest_object_store() -> int:
    """Bytes, of the nodes that are alive."""
    sizes = [n["Resources"].get("object_store_memory", 0) for n in ray.nodes() if n["Alive"]]
    return int(min(sizes))


class Pieces:
    """Batches of rows of ``row_shape``, under way as far as ``share`` allows, the oldest first.

    dtype : of the rows; None: uint8. ask(rows) : begin a piece, without waiting; under the lock.
    wait(piece, request) : its rows; looks at ``request.raise_cancelled()`` once a second. Both may raise.
    """

    def __init__(
        self,
        share: Share,
        row_shape: tuple[int, ...],
        ask: Callable[[np.ndarray], Any],
        wait: Callable[[Any, Request], np.ndarray],
        dtype: np.dtype | None = None,
    ) -> None:
        self.share, self.row_shape = share, row_shape
        self.dtype = np.dtype(np.uint8) if dtype is None else dtype
        self._ask, self._wait = ask, wait
        self._requests: list[weakref.ref[Request]] = []  # in order; those dropped are gone
        self._lock = threading.Lock()

    def start(self, rows: np.ndarray) -> Request:
        """Ask for ``rows`` as far as the share allows; see `RowReader.start`."""
        request = Request(self, rows)
        with self._lock:
            self._requests.append(weakref.ref(request))
            self._fill()
        return request

    def next(self, request: Request) -> np.ndarray:
        """The next piece of ``request``; in any thread."""
        with self._lock:
            request.raise_cancelled()
            self._settle(request)
            if not request.asked:  # it is waited for: now, whatever else is under way
                request.asked.append(self._ask(request.left.popleft()))
            piece = request.asked[0]
        block = self._wait(piece, request)
        with self._lock:
            request.raise_cancelled()
            request.handed_out = True
        return block

    def under_way(self) -> list[Any]:
        """The pieces that are asked for and not handed out yet, the oldest batch's first."""
        with self._lock:
            live = [request for ref in self._requests if (request := ref()) is not None]
            return [piece for r in live for piece in [*r.asked][int(r.handed_out) :]]

    def finish(self, request: Request) -> None:
        """Its last piece is copied, or another's to hold."""
        with self._lock:
            self._settle(request)

    def _settle(self, request: Request) -> None:
        """What was handed out counts as under way until it is copied."""
        if request.handed_out:
            request.handed_out = False
            request.asked.popleft()
            self._fill()

    def drop(self, request: Request) -> None:
        """What it has under way is nobody's share any more; the pieces are let go of."""
        with self._lock:
            request.left.clear()
            request.asked.clear()
            request.handed_out = False

    def _fill(self) -> None:
        live = [r for ref in self._requests if (r := ref()) is not None and (r.left or r.asked)]
        self._requests = [weakref.ref(request) for request in live]
        room = self.share.pieces - sum(len(request.asked) for request in live)
        for request in live:
            while room > 0 and request.left:
                request.asked.append(self._ask(request.left.popleft()))
                room -= 1


class Request:
    """One batch: ``left``, rows of the pieces to ask for yet; ``asked``, those under way. See
    `raypipe.stream.reading.Cancellable`.
    """

    def __init__(self, pieces: Pieces, rows: np.ndarray) -> None:
        step = pieces.share.piece_rows
        self._from = pieces
        self.left = deque(rows[at : at + step] for at in range(0, rows.size, step))
        self.asked = deque[Any]()
        self._rows, self._pieces = rows.size, len(self.left)
        self.handed_out = False
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        """Who waits hears of it within a second. Who makes the rows goes on with what it has begun,
        for nobody.
        """
        self.cancelled.set()
        self._from.drop(self)

    def raise_cancelled(self) -> None:
        """Raise CancelledError when the batch is not wanted any more."""
        if self.cancelled.is_set():
            raise CancelledError

    def __call__(self) -> np.ndarray:
        """Wait; (n, *row_shape), read-only where it came as one piece."""
        if self._pieces == 1:
            block = self._from.next(self)
            self._from.finish(self)
            return block
        whole = np.empty((self._rows, *self._from.row_shape), self._from.dtype)
        at = 0
        while at < self._rows:
            block = self._from.next(self)
            whole[at : at + len(block)] = block
            at += len(block)
            del block  # it leaves the object store before the next one is waited for
        self._from.finish(self)
        return whole
