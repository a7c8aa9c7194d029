"""What reads rows of files on one node's disk for readers elsewhere: an actor a node and run.

It is made by the driver before training (`shards`), opens its files then, so that a copy which is
not there is an error at once, and takes part in its node's budget: a lease of what `THREADS` pieces
take. Ray starts it again on its node when it dies, and sends it what was not answered once more.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from raypipe.cluster.remote_guard import RemoteGuard, join
from raypipe.errors import InputError, StoreError
from raypipe.memory.config import ResolvedMemory
from raypipe.memory.limits import node_limits
from raypipe.store import Place, Placement
from raypipe.stream import ArraySource
from raypipe.stream.mapped import MappedRows

# Reads at once. One fills a disk or a network; a second goes on where the first copies to the store.
THREADS = 4
# Ray, numpy and the maps of such a process were 0.1 GiB; a lease's last 256 MiB cannot be used.
BASE_BYTES = 768 << 20
LEASE_WAIT_S = 120.0


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


class RowServer:
    """Reads rows of ``files``, which lie on this node. An ordinary class: `shards` makes it an actor.

    ``piece_bytes``: the most that is read at once. ``memory``: of the run; None: no lease is taken.
    """

    def __init__(
        self, files: Sequence[Held], piece_bytes: int, memory: ResolvedMemory | None
    ) -> None:
        self._files, self._memory = tuple(files), memory
        self._budget_bytes = BASE_BYTES + THREADS * piece_bytes
        self._maps: dict[ArraySource, MappedRows] | None = None
        self._guard: RemoteGuard | None = None
        self._lock = threading.Lock()

    def ready(self) -> int:
        """Take the lease and open the files, once; this process's number.

        Raises StoreError, which names node and path, and MemoryBudgetExceeded.
        """
        with self._lock:
            if self._maps is None:
                self._guard = self._guard or self._join()
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
        return block

    def close(self) -> None:
        """Give the lease back."""
        if self._guard is not None:
            self._guard.close()

    def _join(self) -> RemoteGuard | None:
        if self._memory is None:
            return None
        limits = node_limits()
        return join(
            self._budget_bytes,
            "row-server",
            capacity_bytes=self._memory.config.capacity_bytes(limits),
            shared_by=limits.shared_by,
            verdict_dir=None,
            wait_s=LEASE_WAIT_S,
        )


def _opened(held: Held) -> MappedRows:
    try:
        held.placement.check(held.place)
        return MappedRows(held.there)
    except InputError as error:
        raise StoreError(
            f"node {held.place.node} does not have {held.place.path} as it should ({error}); bring it "
            "back, copy it there (raypipe store replicate), or take its entry from the catalog"
        ) from error
