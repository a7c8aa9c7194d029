"""What a run finds when it opens a shard: a decision, and the recovery of committed cells.

`decide` is pure. `recover` believes a record only when the bytes on the disk have its checksum,
then gathers the believed records in one journal of the new epoch and removes the older ones: a
writer of a past run that still appends does so to a file that nobody reads.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from raypipe.errors import StoreCorrupt, StoreError
from raypipe.store.checksum import cell_checksums
from raypipe.store.commits import Commits
from raypipe.store.durable import remove, write_atomic
from raypipe.store.journal import header_line
from raypipe.store.layout import ShardPaths
from raypipe.store.manifest import DISCARDED, SEALED, Manifest
from raypipe.store.schema import ShardSpec

log = logging.getLogger(__name__)

Action = Literal["new", "resume", "unseal", "replace", "sealed"]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What lies at a shard's place; sizes in bytes, None when the file is not there."""

    manifest: Manifest | None
    partial_bytes: int | None
    final_bytes: int | None

    @classmethod
    def at(cls, paths: ShardPaths) -> Found:
        """Look. StoreCorrupt when the manifest cannot be read."""
        return cls(
            manifest=Manifest.read(paths.manifest),
            partial_bytes=paths.partial.stat().st_size if paths.partial.exists() else None,
            final_bytes=paths.final.stat().st_size if paths.final.exists() else None,
        )


def decide(found: Found, spec: ShardSpec, *, overwrite: bool) -> Action:
    """What to do with what is there.

    ``unseal``: a crash came after the data got its final name and before the manifest said so.
    ``overwrite`` turns every refusal into ``replace``; a store that fits is still resumed, so that
    the same command after a crash goes on where it was.
    Raises FingerprintMismatch, StoreCorrupt or StoreError for what is not ours to go on with.
    """
    try:
        return _decide(found, spec)
    except StoreError:
        if overwrite:
            return "replace"
        raise


def _decide(found: Found, spec: ShardSpec) -> Action:
    manifest, final = found.manifest, found.final_bytes
    if manifest is None:
        if final is None and found.partial_bytes is None:
            return "new"
        raise StoreError(
            f"{spec.path} is there without its manifest, so what it holds is not known; move it "
            "away, or --overwrite to replace it"
        )
    if manifest.state == DISCARDED:
        return "replace"
    manifest.check_same(spec)
    if manifest.state == SEALED:
        if final == spec.nbytes:
            return "sealed"
        raise StoreCorrupt(
            f"{spec.path} has {final or 0} bytes, its manifest says {spec.nbytes}; restore it, or "
            "--overwrite to extract it again"
        )
    if final is None:
        return "resume"
    if found.partial_bytes is None:
        return "unseal"
    raise StoreError(
        f"{spec.path} was put there while {spec.paths.partial.name} is being written; move it "
        "away, or --overwrite to replace it"
    )


def space_needed(spec: ShardSpec) -> int:
    """Bytes that writing ``spec`` still takes from the disk; 0 when it is sealed already.

    What is at its place counts as available: a partial file is reused, another store replaced.
    """
    paths = spec.paths
    with contextlib.suppress(StoreError):
        if decide(Found.at(paths), spec, overwrite=False) == "sealed":
            return 0
    held = sum(p.stat().st_blocks * 512 for p in (paths.partial, paths.final) if p.exists())
    beside = 65536 + 300 * spec.rows + 400 * len(spec.cells)  # journals, index, manifest
    return max(0, spec.nbytes - held) + beside


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What a resumed run took over, and what it could not.

    torn, damaged: journal lines that are not whole. rejected: rows whose bytes on the disk are not
    those committed. foreign: journals of another store.
    """

    rows_kept: int = 0
    torn: int = 0
    damaged: int = 0
    foreign: int = 0
    rejected: tuple[tuple[int, int], ...] = ()


def recover(
    spec: ShardSpec, fd: int, *, epoch: int, threads: int | None = None
) -> tuple[Commits, Recovery]:
    """Committed cells of the data file ``fd`` that are truly there; older journals are merged.

    The caller holds the run lock, and the fence is past every earlier epoch.
    """
    paths, older = spec.paths, spec.paths.journals()
    commits = Commits.read(spec.cells, older, spec.fingerprint)
    rejected = check_cells(commits, fd, np.flatnonzero(commits.done), threads)
    if older:
        merged = paths.journal / f"{epoch:08d}-recovered.jsonl"
        write_atomic(merged, _merged_lines(commits, spec.fingerprint, epoch))
        remove(path for path in older if path != merged)
    recovery = Recovery(
        rows_kept=commits.rows_done,
        torn=commits.count.torn,
        damaged=commits.count.damaged,
        foreign=commits.count.foreign,
        rejected=tuple(rejected),
    )
    _log(spec, recovery)
    return commits, recovery


def check_cells(
    commits: Commits, fd: int, cells: np.ndarray, threads: int | None = None
) -> list[tuple[int, int]]:
    """Hold ``cells`` against the disk; ranges that no record fits become missing again."""
    numbers = [int(cell) for cell in cells]
    checked = cell_checksums(fd, commits.grid, numbers, threads)
    return [commits.grid.range(cell) for cell, found in checked if not commits.resolve(cell, found)]


def _merged_lines(commits: Commits, fingerprint: str, epoch: int) -> Iterator[bytes]:
    yield header_line(fingerprint, epoch, "recovered")
    yield from commits.lines()


def _log(spec: ShardSpec, recovery: Recovery) -> None:
    if recovery.rows_kept:
        log.info("%s: %d of %d rows kept", spec.path, recovery.rows_kept, spec.rows)
    if recovery.rejected:
        log.warning(
            "%s: %d committed ranges do not have the bytes that were committed, first [%d, %d); "
            "they are computed again",
            spec.path,
            len(recovery.rejected),
            *recovery.rejected[0],
        )
    if recovery.damaged:
        log.warning("%s: %d damaged journal lines dropped", spec.path, recovery.damaged)
