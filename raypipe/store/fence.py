"""The fence: which writers may still write. A writer that a newer run, or this run, has given up
on must not touch the data again, even if it wakes up in the middle of a write.

A writer holds the fence file's lock shared while it checks the epoch *and* writes. The driver
first raises the epoch, then takes the lock once exclusively: when it gets it, every write that
passed the old check is over, and no later check passes. So there is no gap between check and
write. The epoch stands in the locked file itself, in place: on NFS a lock makes the client reread
exactly that file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from raypipe.errors import Fenced, StoreLocked
from raypipe.store.durable import pwrite_all
from raypipe.store.flocks import Flock
from raypipe.store.journal import open_line, seal_line

_BARRIER_S = 60.0  # a write in flight is one cell; a disk that takes a minute for it is stuck
_TORN_READS = 50


@dataclass(frozen=True)
class FenceState:
    """Epoch that may write, whether at all, and single writers of it that may not."""

    epoch: int
    token: str
    closed: bool = False
    fenced: tuple[str, ...] = ()

    def refuses(self, epoch: int, token: str, writer: str) -> str | None:
        """Why a writer of the run ``epoch``, ``token`` may not write, None if it may. Pure.

        The token is random: epochs begin again at 1 when a store was removed and made anew.
        """
        if (epoch, token) != (self.epoch, self.token):
            return f"run epoch {epoch} was superseded by {self.epoch}"
        if self.closed:
            return "the store is being sealed"
        if writer in self.fenced:
            return "the driver gave this writer up and handed its rows to another"
        return None


class Fence:
    """The fence file, opened by the driver (which may raise it) or by a writer (which obeys)."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self.path = path
        self._lock = Flock(path, create=create)

    def read(self) -> FenceState | None:
        """What it says; None when new, or torn by a crash of the machine."""
        for _ in range(_TORN_READS):
            raw = os.pread(self._lock.fd, os.fstat(self._lock.fd).st_size, 0)
            fields = open_line(raw.split(b"\n", 1)[0])
            if fields is not None:
                closed, fenced = bool(fields["closed"]), tuple(fields["fenced"])
                return FenceState(int(fields["epoch"]), str(fields["token"]), closed, fenced)
            if not raw:
                return None
            time.sleep(0.001)  # the driver may be in the middle of writing it
        return None

    def raise_to(self, state: FenceState) -> None:
        """Put ``state`` up and wait until no writer that it refuses is inside a write.

        Raises StoreLocked when one stays inside (stopped, or stuck on its disk) for a minute.
        """
        line = seal_line(asdict(state))
        pwrite_all(self._lock.fd, line, 0)  # what a longer older line leaves behind is not read
        os.fdatasync(self._lock.fd)
        self._barrier()

    def _barrier(self) -> None:
        deadline = time.monotonic() + _BARRIER_S
        while not self._lock.try_exclusive():
            if time.monotonic() > deadline:
                pids = ", ".join(map(str, self._lock.holders())) or "unknown"
                raise StoreLocked(
                    f"{self.path.parent}: a writer (pid {pids}) has been inside a write for "
                    f"{_BARRIER_S:.0f} s; end that process, then run the same command again"
                )
            time.sleep(0.002)
        self._lock.unlock()

    @contextmanager
    def passing(self, epoch: int, token: str, writer: str) -> Iterator[None]:
        """Hold the fence open for one write; Fenced when this writer may not write any more."""
        self._lock.share()
        try:
            state = self.read()
            why = state.refuses(epoch, token, writer) if state else "the fence cannot be read"
            if why:
                raise Fenced(f"writer {writer} of {self.path.parent}: {why}; it must stop")
            yield
        finally:
            self._lock.unlock()

    def close(self) -> None:
        """Close the file."""
        self._lock.close()
