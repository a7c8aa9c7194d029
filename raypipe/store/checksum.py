"""Checksums of cells as they lie on the disk, by several threads in bounded memory.

xxh3_64: it guards against torn and decayed data, not against an adversary. Reads with pread, so a
file that is too short gives None where a map would give SIGBUS.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import xxhash

from raypipe.store.layout import CellGrid

ALGORITHM = "xxh3_64"

_READ_BYTES = 1 << 20
_TASK_BYTES = 64 << 20  # cells a task: enough that a task's overhead does not count


def default_threads() -> int:
    """Threads that keep a disk busy without taking a node: up to 8."""
    return min(8, len(os.sched_getaffinity(0)))


def cell_checksums(
    fd: int, grid: CellGrid, cells: Sequence[int], threads: int | None = None
) -> Iterator[tuple[int, int | None]]:
    """(cell, checksum of its bytes, None where the file ends early), in the order of ``cells``."""
    size = max(1, _TASK_BYTES // (grid.grid * grid.row_bytes))
    tasks = [cells[start : start + size] for start in range(0, len(cells), size)]
    with ThreadPoolExecutor(threads or default_threads()) as pool:
        for found in pool.map(lambda task: _checksum_all(fd, grid, task), tasks):
            yield from found


def _checksum_all(fd: int, grid: CellGrid, cells: Sequence[int]) -> list[tuple[int, int | None]]:
    buffer = memoryview(bytearray(_READ_BYTES))
    return [(int(cell), _checksum(fd, *grid.extent(int(cell)), buffer)) for cell in cells]


def _checksum(fd: int, offset: int, length: int, buffer: memoryview) -> int | None:
    hasher = xxhash.xxh3_64()
    while length:
        got = os.preadv(fd, [buffer[: min(length, len(buffer))]], offset)
        if got == 0:
            return None
        hasher.update(buffer[:got])
        offset, length = offset + got, length - got
    return hasher.intdigest()
