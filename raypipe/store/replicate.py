"""Copies of sealed shards on another disk, byte for byte, sealed last, noted in the catalog.

Every cell is held against the manifest's checksum on its way. A copy that was broken off lies under
its temporary name; the next try keeps its cells that are right. The copy of a store is a store.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import xxhash

from raypipe.errors import (
    ConfigError,
    FingerprintMismatch,
    MissingInput,
    NoSpace,
    StoreCorrupt,
    StoreError,
)
from raypipe.store.checksum import (
    ask_ahead,
    cell_checksums,
    cell_tasks,
    default_threads,
    read_full,
)
from raypipe.store.discard import tidy
from raypipe.store.durable import make_dirs, move, pwrite_all, remove, write_atomic
from raypipe.store.info import find_shards
from raypipe.store.layout import ShardPaths
from raypipe.store.lock import Owner, take_lock, utc_now
from raypipe.store.manifest import SEALED, Manifest
from raypipe.store.reader import FeatureStore, check_file
from raypipe.store.space import explain_os_errors, preallocate, require_space
from raypipe.units import format_bytes

_READ_BYTES = 1 << 20

#: copy: nothing usable is there. again: a copy that is damaged. name: its data is there, a crash
#: came before its manifest. there: nothing to do.
Step = Literal["copy", "again", "name", "there"]


@dataclass(frozen=True, kw_only=True)
class Replica:
    """One shard and its copy; need_bytes: what the copy still takes from its disk."""

    source: Path
    target: Path
    manifest: Manifest
    step: Step
    need_bytes: int


def plan_replicas(store: Path, to: Path) -> list[Replica]:
    """What copying ``store``, a shard or a folder of shards, below ``to`` takes. Writes nothing.

    Raises MissingInput, StoreNotSealed, StoreCorrupt (the source), FingerprintMismatch or
    StoreError (what lies at a copy's place is something else), ConfigError.
    """
    shards = find_shards(store)
    if not shards:
        raise MissingInput(f"{store}: no store there; give a shard's .npy or a folder of stores")
    root = shards[0].parent if shards == [store] else store
    if shards != [store] and to.absolute().is_relative_to(store.absolute()):
        raise ConfigError(f"--to {to} lies inside {store}; choose a folder on another disk")
    return [_plan(shard, to / shard.relative_to(root)) for shard in shards]


def require_room(replicas: Sequence[Replica], to: Path, margin_bytes: int) -> None:
    """Raise NoSpace unless all copies fit and ``margin_bytes`` stay free."""
    need = sum(replica.need_bytes for replica in replicas)
    if not need:
        return
    try:
        require_space({to: need + margin_bytes})
    except NoSpace as error:
        raise NoSpace(
            f"{error}; {format_bytes(need)} are for {len(replicas)} shards, "
            f"{format_bytes(margin_bytes)} are to stay free (--margin)"
        ) from None


def replicate_store(
    replica: Replica,
    *,
    threads: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Path:
    """Make the copy, or find it there; its path. ``progress`` is told of rows.

    Raises StoreCorrupt for a cell of the source whose bytes are not those sealed, StoreLocked,
    NoSpace, StoreError.
    """
    rows, target = replica.manifest.shape[0], ShardPaths.of(replica.target)
    if replica.step == "there":
        progress(rows)
        return replica.target
    with explain_os_errors(replica.target, replica.need_bytes):
        make_dirs(target.folder)
        lock = take_lock(target)
        try:
            try:
                step = _step(replica.source, replica.manifest, target)
            except StoreError:
                remove([target.lock])
                raise
            try:
                Owner.me("replicate", 0).write(target.owner)
                _make(replica, step, threads, progress)
            finally:
                tidy(target)
        finally:
            lock.close()
    return replica.target


def _plan(source: Path, target: Path) -> Replica:
    store = FeatureStore.open(source)  # refuses what is not sealed or was cut short
    manifest = Manifest.read(ShardPaths.of(source).manifest)
    assert manifest is not None and manifest.fingerprint == store.fingerprint
    if target.exists() and target.samefile(source):
        raise ConfigError(f"--to would copy {source} onto itself; choose another folder")
    paths = ShardPaths.of(target)
    step = _step(source, manifest, paths)
    held = sum(p.stat().st_blocks * 512 for p in (paths.partial, paths.final) if p.exists())
    beside = sum(p.stat().st_size for p in _beside(source)) + 65536
    need = 0 if step == "there" else max(0, manifest.cells.file_bytes - held) + beside
    return Replica(source=source, target=target, manifest=manifest, step=step, need_bytes=need)


def _beside(source: Path) -> tuple[Path, Path]:
    paths = ShardPaths.of(source)
    return paths.manifest, paths.index


def _step(source: Path, manifest: Manifest, target: ShardPaths) -> Step:
    """What is to be done at ``target``; raises for what is not a copy of ``source``."""
    there = Manifest.read(target.manifest)
    if there is None:
        if target.journal.exists():
            raise StoreError(f"{target.journal} is left from an extraction; move it away")
        if target.index.exists() and _index_hash(target) != manifest.fields["index"]["xxh3_128"]:
            raise StoreError(f"{target.index} is there without a manifest; move it away")
        return "name" if target.final.exists() else "copy"
    if there.fingerprint != manifest.fingerprint:
        raise FingerprintMismatch(
            f"{target.final} is another store ({there.fingerprint[:12]}, {source} is "
            f"{manifest.fingerprint[:12]}); choose another --to, or remove it"
        )
    if there.state != SEALED:
        raise StoreError(f"{target.final} is being extracted there ({there.state}); wait for it")
    if there.fields["checksums"] != manifest.fields["checksums"]:
        raise FingerprintMismatch(
            f"{target.final} is of the same configuration as {source} and holds other bytes: it "
            "was extracted apart; choose another --to, or remove it"
        )
    try:
        check_file(target.final, there)
    except StoreCorrupt:
        return "again"
    same = target.index.exists() and _index_hash(target) == manifest.fields["index"]["xxh3_128"]
    return "there" if same else "again"


def _index_hash(paths: ShardPaths) -> str:
    return xxhash.xxh3_128_hexdigest(paths.index.read_bytes())


def _make(
    replica: Replica, step: Step, threads: int | None, progress: Callable[[int], None]
) -> None:
    paths, manifest = ShardPaths.of(replica.target), replica.manifest
    if step == "there":  # another made it since the plan
        progress(manifest.shape[0])
        return
    index = ShardPaths.of(replica.source).index.read_bytes()
    if xxhash.xxh3_128_hexdigest(index) != manifest.fields["index"]["xxh3_128"]:
        raise StoreCorrupt(f"index of {replica.source} is not the one sealed; restore it")
    if step == "again":
        # In this order: without its data the manifest means "copy again", data alone means "name".
        if paths.final.exists():
            move(paths.final, paths.partial)
        remove([paths.manifest])
    if step == "name":
        _check_named(replica, threads)
        progress(manifest.shape[0])
    else:
        _copy(replica, paths.partial, threads, progress)
        move(paths.partial, paths.final)
    write_atomic(paths.index, index)
    origin = {"path": str(replica.source.absolute()), "copied": utc_now()}
    fields = {**manifest.fields, "file": paths.final.name, "replica_of": origin}
    Manifest(paths.manifest, fields).write()


def _check_named(replica: Replica, threads: int | None) -> None:
    """The file without a manifest is ours when its every byte is the source's."""
    target, manifest = replica.target, replica.manifest
    fd = os.open(target, os.O_RDONLY)
    try:
        size, header = os.fstat(fd).st_size, os.pread(fd, manifest.cells.data_offset, 0)
        same = size == manifest.cells.file_bytes and _header_fits(header, manifest)
        if not same or len(_good_cells(fd, manifest, threads)) < len(manifest.cells):
            raise StoreError(f"{target} is there without a manifest; move it away")
        os.fsync(fd)
    finally:
        os.close(fd)


def _header_fits(header: bytes, manifest: Manifest) -> bool:
    return xxhash.xxh3_64_hexdigest(header) == manifest.fields["checksums"]["header"]


def _good_cells(fd: int, manifest: Manifest, threads: int | None) -> set[int]:
    expected, grid = manifest.checksums, manifest.cells
    checked = cell_checksums(fd, grid, range(len(grid)), threads)
    return {cell for cell, found in checked if found == expected[cell]}


def _copy(
    replica: Replica, partial: Path, threads: int | None, progress: Callable[[int], None]
) -> None:
    manifest, grid = replica.manifest, replica.manifest.cells
    source = os.open(replica.source, os.O_RDONLY)
    target = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        header = os.pread(source, grid.data_offset, 0)
        if not _header_fits(header, manifest):
            raise StoreCorrupt(f"header of {replica.source} is not the one sealed; restore it")
        begun = os.fstat(target).st_size > 0
        good = _good_cells(target, manifest, threads) if begun else set()
        progress(sum(hi - lo for lo, hi in map(grid.range, good)))
        preallocate(target, partial, grid.file_bytes)
        os.ftruncate(target, grid.file_bytes)
        pwrite_all(target, header, 0)
        todo = [cell for cell in range(len(grid)) if cell not in good]
        for cell in _copy_cells(replica, source, target, todo, threads):
            lo, hi = grid.range(cell)
            progress(hi - lo)
        os.fsync(target)
    finally:
        os.close(source)
        os.close(target)


def _copy_cells(
    replica: Replica, source: int, target: int, cells: list[int], threads: int | None
) -> Iterator[int]:
    """Copy ``cells``, in order as seen from here."""
    grid, expected = replica.manifest.cells, replica.manifest.checksums

    def copy_all(task: Sequence[int]) -> Sequence[int]:
        ask_ahead(source, grid, task)
        buffer = memoryview(bytearray(_READ_BYTES))
        for cell in task:
            if _copy_cell(source, target, *grid.extent(cell), buffer) != expected[cell]:
                lo, hi = grid.range(cell)
                raise StoreCorrupt(
                    f"{replica.source} is damaged in rows [{lo}, {hi}): other bytes than were "
                    "sealed; see raypipe store verify, restore it from a copy"
                )
        return task

    with ThreadPoolExecutor(threads or default_threads()) as pool:
        try:
            for task in pool.map(copy_all, cell_tasks(grid, cells)):
                yield from task
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _copy_cell(source: int, target: int, offset: int, left: int, buffer: memoryview) -> int | None:
    hasher = xxhash.xxh3_64()
    while left:
        data = buffer[: min(left, len(buffer))]
        if read_full(source, data, offset) < len(data):
            return None
        hasher.update(data)
        pwrite_all(target, data, offset)
        offset, left = offset + len(data), left - len(data)
    return hasher.intdigest()
