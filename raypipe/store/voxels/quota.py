"""Room in the cache: what is left of crashed builds goes first, then what was used longest ago.

Nothing goes that a process reads: readers share the lock of an entry, and only who gets it alone
removes it. An entry of a scan that has changed since goes before all others. One process at a time
makes room, and reserves it before it lets the next one count.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from raypipe.errors import NoSpace, StoreCorrupt
from raypipe.store.durable import fsync_dir
from raypipe.store.flocks import Flock
from raypipe.store.space import free_bytes
from raypipe.store.voxels.entry import EntryManifest, EntryPaths
from raypipe.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class Held:
    """An entry that takes room. stale: its scan is known to have changed."""

    key: str
    size_bytes: int
    used_ns: int
    stale: bool


@contextlib.contextmanager
def alone(cache: Path) -> Iterator[None]:
    """Inside, no other process makes room in ``cache``; waits for its turn."""
    lock = Flock(cache / "room.lock")
    try:
        lock.wait_exclusive()
        yield
    finally:
        lock.close()


def eviction_order(entries: Iterable[Held]) -> list[Held]:
    """Which go first: stale ones, then those used longest ago."""
    return sorted(entries, key=lambda entry: (not entry.stale, entry.used_ns, entry.key))


def missing_bytes(used: int, need: int, quota: int | None, free: int | None, scratch: int) -> int:
    """Bytes that must go before ``need`` (and ``scratch`` besides, on the disk) fit; 0 or more."""
    over_quota = used + need - quota if quota is not None else 0
    over_disk = need + scratch - free if free is not None else 0
    return max(0, over_quota, over_disk)


def make_room(
    cache: Path,
    need: int,
    scratch: int,
    quota: int | None,
    *,
    source: dict[str, object],
    say: Callable[[str], None],
) -> None:
    """Remove entries until ``need`` bytes fit the quota, and with ``scratch`` the disk.

    To be called `alone`. Raises NoSpace, and then has removed nothing that it need not have.
    """
    sweep(cache)
    entries, building = entries_of(cache, source), building_bytes(cache)

    def missing(gone: int) -> int:
        used = building + sum(entry.size_bytes for entry in entries) - gone
        return missing_bytes(used, need, quota, free_bytes(cache), scratch)

    if quota is not None and need > quota:
        raise NoSpace(
            f"this entry needs {format_bytes(need)}, the cache's quota is {format_bytes(quota)}; "
            "raise the quota, give a smaller mask, or read with --no-cache"
        )
    gone = 0
    for entry in eviction_order(entries):
        if not missing(gone):
            break
        if remove_entry(EntryPaths(cache=cache, key=entry.key)):
            gone += entry.size_bytes
            say(f"cache {cache}: removed {entry.key}, {format_bytes(entry.size_bytes)}")
    if short := missing(gone):
        raise NoSpace(
            f"cache {cache} needs {format_bytes(need)} and {format_bytes(scratch)} of scratch, "
            f"{format_bytes(short)} too few are left (quota "
            f"{'none' if quota is None else format_bytes(quota)}); what remains is in use: wait, "
            "free disk space, raise the quota, or read with --no-cache"
        )


def entries_of(cache: Path, source: dict[str, object]) -> list[Held]:
    """All whole entries; stale is told of those of ``source``'s path only."""
    found = []
    for manifest in cache.glob("*/manifest.json"):
        paths = EntryPaths(cache=cache, key=manifest.parent.name)
        with contextlib.suppress(FileNotFoundError):  # removed just now
            found.append(
                Held(
                    key=paths.key,
                    size_bytes=folder_bytes(paths.folder),
                    used_ns=_used_ns(paths),
                    stale=_stale(manifest, source),
                )
            )
    return found


def building_bytes(cache: Path) -> int:
    """What entries that are being built by others have reserved, their scratch left out."""
    return sum(path.stat().st_size for path in cache.glob(".*.building/data.npy"))


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in ``folder``."""
    return sum(path.stat().st_size for path in folder.iterdir())


def sweep(cache: Path) -> None:
    """Remove what builds and removals that died have left."""
    for folder in [*cache.glob(".*.building"), *cache.glob(".*.gone")]:
        key = folder.name.removeprefix(".").rsplit(".", 1)[0]
        lock = Flock(EntryPaths(cache=cache, key=key).lock)
        try:
            if lock.try_exclusive() and lock.is_current():
                shutil.rmtree(folder, ignore_errors=True)
                if not EntryPaths(cache=cache, key=key).folder.exists():
                    lock.path.unlink(missing_ok=True)
        finally:
            lock.close()


def remove_entry(paths: EntryPaths) -> bool:
    """Remove a whole entry; False when somebody reads it."""
    lock = Flock(paths.lock)
    try:
        if not (lock.try_exclusive() and lock.is_current()):
            return False
        take_away(paths)
        lock.path.unlink(missing_ok=True)
        return True
    finally:
        lock.close()


def take_away(paths: EntryPaths) -> None:
    """Remove an entry whose lock is held alone: at once by name, then its bytes."""
    shutil.rmtree(paths.gone, ignore_errors=True)
    paths.folder.rename(paths.gone)
    fsync_dir(paths.cache)
    shutil.rmtree(paths.gone)


def _used_ns(paths: EntryPaths) -> int:
    try:
        return paths.lock.stat().st_mtime_ns
    except FileNotFoundError:  # somebody tidied locks away: as old as the entry
        return paths.manifest.stat().st_mtime_ns


def _stale(manifest: Path, source: dict[str, object]) -> bool:
    try:
        theirs = EntryManifest.read(manifest).source
    except StoreCorrupt:  # of no use to anybody
        return True
    return theirs.get("path") == source.get("path") and theirs != source
