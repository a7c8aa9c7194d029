"""A folder of temporary files that goes away with its owner, and one day even after kill -9.

The owner holds a lock in the folder; a folder whose lock is free has lost its owner, and the next one
beside it removes it. A forked child is no owner.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from itertools import count
from pathlib import Path

from raypipe.store.durable import make_dirs
from raypipe.store.flocks import Flock
from raypipe.store.space import explain_os_errors

_PREFIX = "raypipe-fmri-"
_LOCK = "owner.lock"


class Scratch:
    """A temporary folder below ``parent`` (default: the system's), made when this is."""

    def __init__(self, parent: Path | None = None) -> None:
        parent = Path(parent or tempfile.gettempdir()).absolute()
        with explain_os_errors(parent, 0):
            make_dirs(parent)
            sweep(parent)
            self.folder, lock = _own_folder(parent)
        self._numbers = count()
        self._remove = weakref.finalize(self, _remove, self.folder, lock, os.getpid())

    def new(self, name: str) -> Path:
        """A path in the folder that nothing has yet; ``name`` is for people."""
        readable = "".join(c if c.isalnum() or c in ".-" else "-" for c in name)[:80]
        return self.folder / f"{next(self._numbers):04d}-{readable}.npy"

    def used_bytes(self) -> int:
        """Bytes on the disk of all files."""
        return sum(path.stat().st_blocks * 512 for path in self.folder.rglob("*") if path.is_file())

    def keep(self) -> None:
        """Leave the folder on the disk: from here on it is the user's."""
        found = self._remove.detach()
        if found is not None:
            (self.folder / _LOCK).unlink(missing_ok=True)  # without it nobody sweeps it
            found[2][1].close()

    def remove(self) -> None:
        """Remove the folder and all in it; again is no harm."""
        self._remove()


def sweep(parent: Path) -> list[Path]:
    """Remove the folders of owners that are gone; returns them."""
    gone = []
    for lock_file in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            lock = Flock(lock_file, create=False)
        except OSError:  # removed since, or another user's
            continue
        if lock.try_exclusive() and lock.is_current():
            shutil.rmtree(lock_file.parent, ignore_errors=True)
            gone.append(lock_file.parent)
        lock.close()
    return gone


def _own_folder(parent: Path) -> tuple[Path, Flock]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))
        lock = Flock(folder / _LOCK)
        if lock.try_exclusive() and lock.is_current():
            return folder, lock
        lock.close()  # somebody swept between the two steps


def _remove(folder: Path, lock: Flock, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()
