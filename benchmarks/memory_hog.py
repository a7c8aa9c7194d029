"""One process of benchmarks/memory.py: says that it is ready, waits for a line, does one thing.

KIND: numpy, torch, bytearray: takes SIZE bytes in one call, at full speed; huge: as fast as the
machine gives memory, in huge pages by one thread a core; hold: keeps SIZE bytes; churn: keeps SIZE
bytes and takes and gives back a few more, without a pause; map: maps and reads the file SIZE;
wake: wakes every SIZE seconds, at the watch's priority, and does nothing.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np


def _map(path: str) -> int:
    with (
        Path(path).open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view,
    ):
        for at in range(0, len(view), mmap.PAGESIZE):
            view[at]
        return _statm()[1] - at_start[1]


def _statm() -> tuple[int, int]:
    """(anonymous, file) bytes resident."""
    fields = Path("/proc/self/statm").read_text().split()
    resident, shared = int(fields[1]), int(fields[2])
    return (resident - shared) * mmap.PAGESIZE, shared * mmap.PAGESIZE


def _huge(size: str) -> mmap.mmap:
    """The kernel zeroes 2 MiB a touch; a part a thread: numpy fills without the GIL."""
    held = mmap.mmap(-1, int(size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held.madvise(mmap.MADV_HUGEPAGE)
    page = 2 * 1024**2
    whole = np.frombuffer(held, np.uint8)[: len(held) // page * page].reshape(-1, page)
    parts = np.array_split(np.arange(len(whole)), os.cpu_count() or 1)
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(lambda rows: whole[rows[0] : rows[-1] + 1, 0].fill(1), parts))
    return held


def _churn(size: str) -> None:
    held = bytearray(int(size))
    print(0, 0, flush=True)
    while held:
        bytearray(4 * 1024**2)


def _wake(every_s: str) -> None:
    due = time.monotonic()
    while True:
        due = max(due + float(every_s), time.monotonic())  # as the watch: none is made up for
        time.sleep(max(0.0, due - time.monotonic()))


def _take(kind: str) -> Callable[[str], Any]:
    """What does the work, its library loaded."""
    if kind == "map":
        return _map
    if kind == "huge":
        return _huge
    if kind == "churn":
        return _churn
    if kind == "wake":
        from raypipe.memory.ending import raise_priority

        raise_priority()
        return _wake
    if kind == "numpy":
        return lambda size: np.ones(int(size) // 8)
    if kind == "torch":
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        return lambda size: torch.ones(int(size) // 4)
    return lambda size: bytearray(int(size))  # one memset in C, the GIL held


kind, size = sys.argv[1:3]
take = _take(kind)
at_start = _statm()
print(*at_start, flush=True)
if not sys.stdin.readline():  # who would watch it is gone
    sys.exit()
began = time.perf_counter()
held = take(size)
print(time.perf_counter() - began, held if kind == "map" else 0, flush=True)
if kind == "hold":
    sys.stdin.readline()
