"""Checksums of cells as they lie on the disk, by several threads in bounded memory.

xxh3_64: it guards against torn and decayed data, not against an adversary. Reads with pread, so a
file that is too short gives None where a map would give SIGBUS. preadv and xxhash both release the
GIL: two threads read and hash at the same time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import xxhash

from raypipe.store.layout import CellGrid

ALGORITHM = "xxh3_64"

_READ_BYTES = 1 << 20
TASK_BYTES = 64 << 20  # cells a task: enough that a task's overhead does not count


def default_threads() -> int:
    """Threads that keep a disk busy without taking a node: up to 4, no more than cores."""
    return min(4, len(os.sched_getaffinity(0)))


def cell_checksums(
    fd: int, grid: CellGrid, cells: Sequence[int], threads: int | None = None
) -> Iterator[tuple[int, int | None]]:
    """(cell, checksum of its bytes, None where the file ends early), in the order of ``cells``."""
    tasks = cell_tasks(grid, cells)
    with ThreadPoolExecutor(threads or default_threads()) as pool:
        for found in pool.map(lambda task: _checksum_all(fd, grid, task), tasks):
            yield from found


def cell_tasks(grid: CellGrid, cells: Sequence[int]) -> list[Sequence[int]]:
    """``cells`` in order, in pieces of about `TASK_BYTES`."""
    size = max(1, TASK_BYTES // (grid.grid * grid.row_bytes))
    return [cells[start : start + size] for start in range(0, len(cells), size)]


def ask_ahead(fd: int, grid: CellGrid, cells: Sequence[int]) -> None:
    """Have the kernel begin to read ``cells``, when they lie in one piece, while others are hashed.

    A network or spinning disk then sees one long request instead of many of 1 MiB.
    """
    first, last = grid.extent(int(cells[0])), grid.extent(int(cells[-1]))
    if hasattr(os, "posix_fadvise") and int(cells[-1]) - int(cells[0]) == len(cells) - 1:
        os.posix_fadvise(fd, first[0], sum(last) - first[0], os.POSIX_FADV_WILLNEED)


def read_full(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill ``buffer`` from ``offset``; the bytes that the file had, fewer only at its end."""
    done = 0
    while done < len(buffer):
        got = os.preadv(fd, [buffer[done:]], offset + done)
        if got == 0:
            break
        done += got
    return done


def _checksum_all(fd: int, grid: CellGrid, cells: Sequence[int]) -> list[tuple[int, int | None]]:
    ask_ahead(fd, grid, cells)
    buffer = memoryview(bytearray(_READ_BYTES))
    found: list[tuple[int, int | None]] = []
    for run in _runs(cells, max(1, _READ_BYTES // (grid.grid * grid.row_bytes))):
        if len(run) == 1:
            found.append((run[0], _checksum(fd, *grid.extent(run[0]), buffer)))
        else:
            found += _checksum_run(fd, grid, run, buffer)
    return found


def _runs(cells: Sequence[int], most: int) -> Iterator[list[int]]:
    """Neighbours of ``cells``, up to ``most`` together: what one read takes in."""
    run: list[int] = []
    for cell in map(int, cells):
        if run and (len(run) == most or cell != run[-1] + 1):
            yield run
            run = []
        run.append(cell)
    if run:
        yield run


def _checksum_run(
    fd: int, grid: CellGrid, run: list[int], buffer: memoryview
) -> Iterator[tuple[int, int | None]]:
    start, end = grid.extent(run[0])[0], sum(grid.extent(run[-1]))
    got = read_full(fd, buffer[: end - start], start)
    for cell in run:
        offset, length = grid.extent(cell)
        at = offset - start
        whole = at + length <= got
        yield cell, xxhash.xxh3_64_intdigest(buffer[at : at + length]) if whole else None


def _checksum(fd: int, offset: int, length: int, buffer: memoryview) -> int | None:
    hasher = xxhash.xxh3_64()
    while length:
        got = os.preadv(fd, [buffer[: min(length, len(buffer))]], offset)
        if got == 0:
            return None
        hasher.update(buffer[:got])
        offset, length = offset + got, length - got
    return hasher.intdigest()
