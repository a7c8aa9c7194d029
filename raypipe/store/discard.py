"""Removing a shard, or what is left of its writing; the lock goes last, by whoever holds it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from raypipe.errors import StoreCorrupt
from raypipe.store.durable import remove
from raypipe.store.fence import Fence, FenceState
from raypipe.store.layout import ShardPaths
from raypipe.store.lock import take_lock
from raypipe.store.manifest import DISCARDED, Manifest


def discard_store(path: Path) -> None:
    """Remove a shard and all that belongs to it; StoreLocked while a run writes it."""
    paths = ShardPaths.of(path)
    if not paths.folder.is_dir():
        return
    lock = take_lock(paths)
    try:
        _pass_the_fence(paths)
        with contextlib.suppress(StoreCorrupt):  # a manifest that cannot be read goes all the same
            manifest = Manifest.read(paths.manifest)
            if manifest is not None:
                manifest.with_state(DISCARDED).write()
        remove_contents(paths)
        remove([paths.manifest])
        tidy(paths)
    finally:
        lock.close()


def _pass_the_fence(paths: ShardPaths) -> None:
    if paths.fence.exists():
        fence = Fence(paths.fence)
        state = fence.read()
        fence.raise_to(FenceState((state.epoch if state else 0) + 1, "", closed=True))
        fence.close()


def remove_contents(paths: ShardPaths) -> None:
    """Data, journals, index and places; the manifest, the fence and the lock stay."""
    remove([paths.final, paths.partial, paths.index, paths.places, *paths.journals()])


def tidy(paths: ShardPaths) -> None:
    """Remove journals, fence, owner, temporary files and, last, the lock that the caller holds."""
    whole = (paths.manifest, paths.index, paths.owner)
    temporary = [path.with_name(f".{path.name}.tmp") for path in whole]
    inside = list(paths.journal.iterdir()) if paths.journal.is_dir() else []
    remove([*inside, *temporary, paths.owner])
    with contextlib.suppress(FileNotFoundError):
        paths.journal.rmdir()
    remove([paths.lock])
