"""Who builds an entry: it is there already, or this process holds its lock alone, or another does.

The entry is looked for by name first: the lock is taken alone only for one that is not there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.errors import MissingInput, StoreCorrupt, StoreLocked
from raypipe.read.nifti import Scan
from raypipe.store.durable import make_dirs
from raypipe.store.flocks import Flock
from raypipe.store.space import explain_os_errors
from raypipe.store.voxels.entry import (
    EntryPaths,
    entry_key,
    mask_hash,
    mask_voxels,
    source_facts,
)
from raypipe.store.voxels.quota import take_away
from raypipe.store.voxels.reader import VoxelStore

Say = Callable[[str], None]

_POLL_S = 0.02


@dataclass(frozen=True, kw_only=True, eq=False)
class Wanted:
    """An entry, named by all that it depends on."""

    scan: Scan
    voxels: np.ndarray
    mask: str
    source: dict[str, Any]
    paths: EntryPaths

    @classmethod
    def of(cls, scan: Scan, mask_flat: np.ndarray | None, cache_dir: Path) -> Wanted:
        """The entry of ``scan``, as it lies on the disk now, under the mask."""
        voxels = mask_voxels(scan, mask_flat)
        mask, source = mask_hash(voxels), source_facts(scan)
        scan.check_unchanged()
        paths = EntryPaths(cache=Path(cache_dir).absolute(), key=entry_key(source, mask))
        return cls(scan=scan, voxels=voxels, mask=mask, source=source, paths=paths)


def look(wanted: Wanted, say: Say) -> VoxelStore | None:
    """The entry if it is there and whole; a damaged one is removed, and that is said."""
    if not wanted.paths.manifest.exists():
        return None
    try:
        return VoxelStore.open(wanted.paths.cache, wanted.paths.key, patience_s=0)
    except (MissingInput, StoreLocked):  # removed or taken since
        return None
    except StoreCorrupt as error:
        _drop(wanted.paths, f"{error}", say)
        return None


def claim(wanted: Wanted, wait_s: float | None, say: Say) -> VoxelStore | Flock:
    """The entry, or its lock, held alone, when it is to be built by the caller.

    Raises StoreLocked when another process still builds it after ``wait_s`` seconds (None: waits).
    """
    with explain_os_errors(wanted.paths.cache, 0):
        make_dirs(wanted.paths.cache)
    deadline = None if wait_s is None else time.monotonic() + wait_s
    told = False
    while True:
        if (found := look(wanted, say)) is not None:
            return found
        lock = Flock(wanted.paths.lock)
        if lock.try_exclusive() and lock.is_current() and not wanted.paths.manifest.exists():
            return lock
        who = "pid " + (", ".join(map(str, lock.holders())) or "unknown")
        lock.close()
        if deadline is not None and time.monotonic() >= deadline:
            raise StoreLocked(f"cache entry {wanted.paths.folder} is being built by {who}")
        if not told:
            say(f"{wanted.scan.path.name}: waiting for {who}, which builds its cache entry")
            told = True
        time.sleep(_POLL_S)


def _drop(paths: EntryPaths, why: str, say: Say) -> None:
    lock = Flock(paths.lock)
    try:
        if not (lock.try_exclusive() and lock.is_current()):
            raise StoreCorrupt(f"{why}; another process holds it open")
        if paths.folder.exists():
            take_away(paths)
            say(f"{why}: removed, to be built again")
    finally:
        lock.close()
