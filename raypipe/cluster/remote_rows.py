"""Rows of files on other nodes' disks, as a `raypipe.stream.reading.RowReader`.

They are read there by that node's `row_server`, and fetched through the object store, where a batch
of one piece is not copied again. A batch is asked for in `pieces`, which bound what is under way.
Rows that do not come are said from when they were asked for, whichever reader is waited for (`stalls`).
Which sources are read so: `raypipe.store.placement`; who makes the readers: `shards`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    RayError,
    RayTaskError,
)

from raypipe.cluster.budget import Lease, await_verdict
from raypipe.cluster.lost import ACTOR_LOST
from raypipe.cluster.pieces import Pieces, Request, Share
from raypipe.cluster.stalls import Stalls
from raypipe.errors import ConfigError, MemoryBudgetExceeded, RaypipeError, WorkerFailed
from raypipe.memory.verdict import Verdict
from raypipe.store.catalog import REPLICATE
from raypipe.stream import ArraySource

ASK_AGAIN_S = 1.0
# A verdict is flushed to the disk right after the kill; a slow disk gets this long.
VERDICT_WAIT_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Seconds after rows were asked for, or the last ones before them came: until it is said, said
    again, and until that is the end.
    """

    first_word_s: float = 20.0
    again_s: float = 60.0
    give_up_s: float = 600.0


@dataclass(frozen=True)
class Copy:
    """``source``, as the node that has it names it, and the handle of that node's server.

    lease : the server's, None when nobody watches it
    """

    source: ArraySource
    server: Any
    lease: Lease | None = None

    @property
    def words(self) -> str:
        """For people."""
        return f"{self.source.path} on node {self.source.node}"


class RemoteRows:
    """Reads ``source`` from the first of ``copies`` whose node is there. See `RowReader`.

    ``name``: the source's, for ``say``, which is told of a batch that does not come. ``stalls``: of the
    process's readers; None: it is alone. Raises (where a batch is waited for) WorkerFailed, which names
    the node, when no copy is left or nothing came in ``patience.give_up_s``, and then also the other
    readers that are late; MemoryBudgetExceeded when the last copy's server was ended for its memory
    each time; and what the server raises.
    """

    names_itself = True

    def __init__(
        self,
        source: ArraySource,
        name: str,
        copies: Sequence[Copy],
        share: Share,
        say: Callable[[str], None],
        patience: Patience = Patience(),
        stalls: Stalls | None = None,
    ) -> None:
        self.source, self.name = source, name
        self._copies, self._lock = list(copies), threading.Lock()
        self._say, self._patience = say, patience
        self._came_at = self._next_word = 0.0
        self._stalls = stalls if stalls is not None else Stalls()
        self._stalls.add(self)
        self._pieces = Pieces(share, (source.row_bytes,), self._ask, self._wait)

    def check(self, rows: np.ndarray) -> None:
        """Raise ConfigError for a row that there is not."""
        if rows.min() < 0 or rows.max() >= self.source.n_rows:
            raise ConfigError(
                f"rows {rows.min()}..{rows.max()} asked of {self._copies[0].words}, which has "
                f"{self.source.n_rows}; was the split made for another store?"
            )

    def start(self, rows: np.ndarray) -> Request:
        """Ask for ``rows`` as far as the share allows; see `RowReader.start`."""
        return self._pieces.start(rows)

    def _ask(self, rows: np.ndarray) -> _Piece:
        copy = self._copies[0]  # there is always one
        return _Piece(rows, copy, copy.server.read.remote(copy.source, rows))

    def look(self) -> None:
        """Say what is late, of all readers of the process: for who waits for something else."""
        self._stalls.look()

    def say_if_late(self, now: float) -> None:
        """As `stalls.Late`."""
        found = self._latest(now)
        if found is None:
            self._next_word = 0.0
        elif now >= self._next_word:
            piece, waited = found
            self._say(
                f"{self.name}: has waited {waited:.0f} s for {piece.rows.size} rows of "
                f"{piece.copy.words}; ends after {self._patience.give_up_s:.0f} s"
            )
            self._next_word = now + self._patience.again_s

    def late(self, now: float) -> str:
        """As `stalls.Late`."""
        found = self._latest(now)
        return self._missing(*found) if found is not None else ""

    def _latest(self, now: float) -> tuple[_Piece, float] | None:
        """The piece that is late for longest, and the seconds; None when none is."""
        for piece in self._pieces.under_way():
            waited = self._waited(piece, now)
            if waited >= self._patience.first_word_s and not piece.has_come():
                return piece, waited
        return None

    def _waited(self, piece: _Piece, now: float) -> float:
        return now - max(piece.since, self._came_at)

    def _missing(self, piece: _Piece, waited: float) -> str:
        return f"{self.name}: {piece.rows.size} rows of {piece.copy.words} did not come in {waited:.0f} s"

    def _wait(self, piece: _Piece, request: Request) -> np.ndarray:
        now = time.monotonic()
        if self._waited(piece, now) >= self._patience.first_word_s and piece.has_come():
            piece.since = now  # nobody has fetched it: from here on its way is waited for
        piece.is_waited_for = True
        # In turns: a request may be cancelled, and another reader late.
        step_s = min(1.0, self._patience.first_word_s / 4)
        while True:
            request.raise_cancelled()
            ready, _ = ray.wait([piece.ref], timeout=step_s)
            if ready and (block := self._got(piece, request)) is not None:
                self._came_at = time.monotonic()
                return block
            self._stalls.look()
            self._give_up(piece)

    def _got(self, piece: _Piece, request: Request) -> np.ndarray | None:
        """The rows of a piece that is answered; None where it was asked for again."""
        try:
            return ray.get(piece.ref)
        except ActorUnavailableError:
            # Its node is cut off, or lost and not declared so yet: that takes Ray half a minute.
            request.cancelled.wait(ASK_AGAIN_S)
            request.raise_cancelled()
            self._ask_again(piece, None)
        except (*ACTOR_LOST, ObjectLostError) as error:
            self._ask_again(piece, error)
        except RayTaskError as error:
            if isinstance(error.cause, RaypipeError):
                raise error.cause from None
            raise
        return None

    def _give_up(self, piece: _Piece) -> None:
        """Raise WorkerFailed, which names all readers that are late, where it is time to."""
        waited = self._waited(piece, time.monotonic())
        if waited >= self._patience.give_up_s:
            raise WorkerFailed(
                f"{self._stalls.all_late() or self._missing(piece, waited)}; see to the node and its "
                f"disk, then run the same command again, or copy the store elsewhere first ({REPLICATE})"
            )

    def _ask_again(self, piece: _Piece, gone: Exception | None) -> None:
        """After Ray has tried again already, from the next copy if there is one; ``gone``: the error
        of a server, or its node, that does not come back.
        """
        lost = piece.copy
        with self._lock:
            first = self._copies[0] is lost  # else another piece has found out
            if first and gone is not None and len(self._copies) == 1:
                if verdict := verdict_on(lost.lease, piece.asked):
                    raise MemoryBudgetExceeded(f"{self.name}: {verdict.message()}") from gone
                said = str(gone).strip().splitlines()[0][:200]
                raise WorkerFailed(
                    f"{self.name}: {lost.words} cannot be read any more, its server is gone for good "
                    f"({said}) and no other node has a copy; bring the node back, or copy the store to "
                    f"another ({REPLICATE}), then run the same command again"
                ) from gone
            if first and len(self._copies) > 1:
                del self._copies[0]
                self._copies += [lost] if gone is None else []
                how = "is not reached" if gone is None else "is lost"
                self._say(f"{self.name}: {lost.words} {how}; goes on with {self._copies[0].words}")
            again = self._ask(piece.rows)
        piece.copy, piece.ref = again.copy, again.ref


def verdict_on(lease: Lease | None, since: float = 0.0) -> Verdict | None:
    """Why a server under ``lease`` that is gone for good was ended, if it was for its memory.

    since : seconds since 1970; it may have outlived an earlier verdict
    """
    found = await_verdict(lease.order, lease.label, VERDICT_WAIT_S) if lease else None
    return found if found and found.when >= since else None


class _Piece:
    """Rows that are on their way, asked for at ``since`` (`time.monotonic`)."""

    def __init__(self, rows: np.ndarray, copy: Copy, ref: Any) -> None:
        self.rows, self.copy, self.ref = rows, copy, ref
        self.asked, self.since = time.time(), time.monotonic()
        self.is_waited_for = False

    def has_come(self) -> bool:
        """Whether the rows are there, or an error in their place: while nobody waits for them, on the
        node that has read them.
        """
        if not ray.wait([self.ref], timeout=0, fetch_local=self.is_waited_for)[0]:
            return False
        try:
            ray.get(self.ref, timeout=0.01)
        except (GetTimeoutError, RayTaskError):  # there and not here; the reader's own error
            return True
        except RayError:  # cut off, or gone: it will be asked for again
            return False
        return True
