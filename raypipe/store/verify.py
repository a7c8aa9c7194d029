"""Verification: is a sealed shard, byte for byte, what its manifest says? For people and CI.

Reads everything once. Header, size, fingerprint and index are checked as well as the data.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import xxhash

from raypipe.errors import MissingInput, StoreCorrupt, StoreNotSealed
from raypipe.store.checksum import cell_checksums
from raypipe.store.index import read_index
from raypipe.store.layout import ShardPaths
from raypipe.store.manifest import DISCARDED, SEALED, Manifest
from raypipe.store.reader import check_file
from raypipe.store.schema import names_digest


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What verification found. bad_ranges: rows [lo, hi) whose bytes are not those committed,
    neighbours joined. problems: one line each, anything else that is wrong.
    """

    path: Path
    bad_ranges: tuple[tuple[int, int], ...]
    problems: tuple[str, ...]
    rows: int
    bytes_read: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.bad_ranges and not self.problems


def verify(path: Path | str, threads: int | None = None) -> VerifyReport:
    """Check the sealed shard ``path`` with ``threads`` readers.

    Raises MissingInput or StoreNotSealed when there is no sealed shard; damage is reported, not
    raised.
    """
    path, started = Path(path), time.monotonic()
    manifest = _sealed_manifest(path)
    problems = _file_problems(path, manifest) + _index_problems(path, manifest)
    bad, bytes_read = _bad_ranges(path, manifest, threads)
    return VerifyReport(
        path=path,
        bad_ranges=tuple(bad),
        problems=tuple(problems),
        rows=manifest.shape[0],
        bytes_read=bytes_read,
        seconds=time.monotonic() - started,
    )


def _sealed_manifest(path: Path) -> Manifest:
    manifest = Manifest.read(ShardPaths.of(path).manifest)
    if manifest is None or manifest.state == DISCARDED:
        raise MissingInput(f"no store at {path}; name the .npy of a shard that raypipe wrote")
    if manifest.state != SEALED:
        raise StoreNotSealed(f"{path} is not finished; run the extract command that writes it")
    return manifest


def _file_problems(path: Path, manifest: Manifest) -> list[str]:
    try:
        check_file(path, manifest)
    except StoreCorrupt as error:
        return [str(error)]
    with path.open("rb") as file:
        header = xxhash.xxh3_64_hexdigest(file.read(manifest.cells.data_offset))
    same = header == manifest.fields["checksums"].get("header")
    return [] if same else [f"header of {path} is not the one that was sealed; extract again"]


def _index_problems(path: Path, manifest: Manifest) -> list[str]:
    index = ShardPaths.of(path).index
    try:
        table = read_index(index)
        same = manifest.fields["index"]["xxh3_128"] == xxhash.xxh3_128_hexdigest(index.read_bytes())
        names = names_digest(table.column("name").to_pylist())
    except (StoreCorrupt, OSError, KeyError) as error:
        return [str(error)]
    problems = [] if same else [f"{index} is not the file that was sealed"]
    if names != manifest.fields["names_digest"]:
        problems.append(f"{index} names other rows than the manifest; put the original back")
    return problems


def _bad_ranges(
    path: Path, manifest: Manifest, threads: int | None
) -> tuple[list[tuple[int, int]], int]:
    """Ranges with a wrong checksum, and the bytes that were read."""
    grid, expected = manifest.cells, manifest.checksums
    if not path.exists():
        return [(0, grid.rows)], 0
    bad: list[tuple[int, int]] = []
    bytes_read = 0
    fd = os.open(path, os.O_RDONLY)
    try:
        for cell, found in cell_checksums(fd, grid, range(len(grid)), threads):
            lo, hi = grid.range(cell)
            bytes_read += grid.extent(cell)[1] if found is not None else 0
            if cell < len(expected) and found == expected[cell]:
                continue
            if bad and bad[-1][1] == lo:
                lo = bad.pop()[0]
            bad.append((lo, hi))
    finally:
        os.close(fd)
    return bad, bytes_read
