"""flock(2) on a file, let go of in forked children.

The kernel drops the lock when its holder dies, by kill -9 too, so there is no stale lock to clean
up. On NFS (Linux) flock works between nodes; a filesystem without it (Lustre mounted without
``-o flock``) is refused, not written unlocked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

from raypipe.errors import StoreError, StoreLocked

_open_locks: weakref.WeakSet[Flock] = weakref.WeakSet()
_fork_hook: list[bool] = []


class Flock:
    """An open file that can be locked; the lock lives as long as this object's descriptor."""

    def __init__(self, path: Path, *, create: bool = True) -> None:
        """Open ``path``, made when ``create``; FileNotFoundError otherwise."""
        self.path = path
        self.fd = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
        _open_locks.add(self)
        if not _fork_hook:
            # A forked child shares the open file: it would hold the lock after our death.
            _fork_hook.append(True)
            os.register_at_fork(after_in_child=_close_all)

    def try_exclusive(self) -> bool:
        """Take the lock for this process alone; False when another holds it."""
        return self._flock(fcntl.LOCK_EX | fcntl.LOCK_NB)

    def wait_exclusive(self) -> None:
        """Wait for the lock, for this process alone."""
        self._flock(fcntl.LOCK_EX)

    def share(self) -> None:
        """Wait for the lock, together with others that share it."""
        self._flock(fcntl.LOCK_SH)

    def try_share(self) -> bool:
        """Share the lock with others; False when one holds it alone."""
        return self._flock(fcntl.LOCK_SH | fcntl.LOCK_NB)

    def unlock(self) -> None:
        """Let go, stay open."""
        self._flock(fcntl.LOCK_UN)

    def _flock(self, operation: int) -> bool:
        if self.fd < 0:
            raise StoreError(
                f"{self.path} is closed here; after a fork, open it again in the child"
            )
        try:
            fcntl.flock(self.fd, operation)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}:
                raise StoreError(
                    f"{self.path} cannot be locked ({error.strerror}): this filesystem has no "
                    "flock; mount it with locks (Lustre: -o flock) or choose another folder"
                ) from error
            raise
        return True

    def is_current(self) -> bool:
        """Whether the path still names this very file."""
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(self.fd))

    def close(self) -> None:
        """Let go and close; again is no harm."""
        fd, self.fd = self.fd, -1
        _open_locks.discard(self)
        if fd >= 0:
            os.close(fd)

    def holders(self) -> list[int]:
        """Pids on this node that hold the lock, as far as the kernel tells."""
        stat = os.fstat(self.fd)
        wanted = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
        with contextlib.suppress(OSError, ValueError, IndexError):
            entries = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
            return [int(e[4]) for e in entries if e[1] == "FLOCK" and e[5] == wanted]
        return []


@contextlib.contextmanager
def held(path: Path, refusal: str, patience_s: float = 0.0) -> Iterator[None]:
    """Hold the lock file ``path`` inside, and remove it at the end; StoreLocked(``refusal``) when
    another still has it after ``patience_s`` seconds.
    """
    deadline = time.monotonic() + patience_s
    while True:
        lock = Flock(path)
        if not lock.try_exclusive():
            lock.close()
            if time.monotonic() >= deadline:
                raise StoreLocked(refusal)
            time.sleep(0.02)
        elif lock.is_current():
            break
        else:  # its last holder removed it since we opened it
            lock.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()


def _close_all() -> None:
    for lock in list(_open_locks):
        lock.close()
