"""What reads rows of files on one node's disk for readers elsewhere: an actor a node and run.

It is made by the driver before training (`serving`), opens its files then, so that a copy which is
not there is an error at once, and takes part in its node's budget: a lease of what `THREADS` pieces
take. Ray starts it again on its node when it dies, and sends it what was not answered once more; one
that was ended for its memory asks for twice as much then. Whose last try it was, says `remote_rows`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np

from raypipe.cluster.budget import LEASE_WAIT_S, Lease, helping, verdicts
from raypipe.errors import InputError, StoreError
from raypipe.memory.guard import current, note, relieve
from raypipe.store import Place, Placement
from raypipe.store.catalog import REPLICATE
from raypipe.stream import ArraySource
from raypipe.stream.mapped import MappedRows

# Reads at once. One fills a disk or a network; a second goes on where the first copies to the store.
THREADS = 4
# Ray, numpy and the maps of such a process were 0.1 GiB; a lease's last 256 MiB cannot be used.
BASE_BYTES = 768 << 20


@dataclass(frozen=True)
class Held:
    """A source that lies at ``place``."""

    source: ArraySource
    placement: Placement
    place: Place

    @property
    def there(self) -> ArraySource:
        """The source as its node names it."""
        return replace(self.source, path=self.place.path, node=self.place.node)


def budget_bytes(piece_bytes: int, most_bytes: int) -> int:
    """Bytes of a server that reads pieces of ``piece_bytes``; never above ``most_bytes``, the run's
    budget per process.
    """
    return min(most_bytes, BASE_BYTES + THREADS * piece_bytes)


def grown_bytes(lease: Lease, ended: int) -> int:
    """Bytes to ask for when servers of this lease were ``ended`` for their memory: doubled each time,
    up to the run's budget per process.
    """
    most_bytes = lease.order.memory.config.budget_bytes
    return min(most_bytes, lease.budget_bytes << ended)


class RowServer:
    """Reads rows of ``files``, which lie on this node. An ordinary class: `serving` makes it an actor.

    ``lease``: see `budget_bytes`; None: nobody watches it. It is waited for as long as workers wait.
    """

    lease_wait_s = LEASE_WAIT_S

    def __init__(self, files: Sequence[Held], lease: Lease | None) -> None:
        self._files, self._lease = tuple(files), lease
        self._maps: dict[ArraySource, MappedRows] | None = None
        self._held: ExitStack | None = None
        self._lock = threading.Lock()

    def ready(self, starting: bool = False) -> int:
        """Take the lease and open the files, once; this process's number.

        starting : the run has not begun: see `helping`. Raises StoreError, which names node and path,
        and MemoryBudgetExceeded.
        """
        with self._lock:
            if self._maps is None:
                self._held = self._held or self._watched(goes_on=not starting)
                self._maps = {held.there: _opened(held) for held in self._files}
        return os.getpid()

    def read(self, source: ArraySource, rows: np.ndarray) -> np.ndarray:
        """``rows`` (n,) of one of the files, (n, row_bytes) uint8. Raises as `MappedRows.take`."""
        self.ready()  # again, when this process is one that was started anew
        assert self._maps is not None
        mapped = self._maps[source]
        if mapped.resident(rows) is False:
            mapped.ask_for(rows)
        block = np.empty((rows.size, source.row_bytes), np.uint8)
        mapped.take(rows, block)
        if current().pressure():
            relieve()
        return block

    def close(self) -> None:
        """Give the lease back."""
        if self._held is not None:
            self._held.close()

    def _watched(self, goes_on: bool) -> ExitStack:
        stack, lease = ExitStack(), self._lease
        if lease is not None:
            budget_bytes = grown_bytes(lease, len(verdicts(lease.order, lease.label)))
            stack.enter_context(
                helping(
                    lease.order,
                    lease.label,
                    budget_bytes,
                    wait_s=self.lease_wait_s,
                    goes_on=goes_on,
                )
            )
            note(phase="read rows")
        return stack


def _opened(held: Held) -> MappedRows:
    try:
        held.placement.check(held.place)
        return MappedRows(held.there)
    except InputError as error:
        raise StoreError(
            f"node {held.place.node} does not have {held.place.path} as it should ({error}); bring it "
            f"back, copy it there ({REPLICATE}), or take its entry from the catalog"
        ) from error
