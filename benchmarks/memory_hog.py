"""One process of benchmarks/memory.py: says that it is ready, waits for a line, does one thing.

KIND: numpy, torch, bytearray: takes SIZE bytes in one call, at full speed; free: as bytearray, for
the time it takes; hold: keeps SIZE bytes; map: maps and reads the file SIZE.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


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


def _take(kind: str) -> Callable[[str], Any]:
    """What does the work, its library loaded."""
    if kind == "map":
        return _map
    if kind == "numpy":
        import numpy as np

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
