"""Many small rows of a file's map -> memory by one system call, which cannot be ended by SIGBUS.

process_vm_readv of this process itself (Linux): a page that is gone, because the file was cut short
meanwhile, is an error of the call, where the processor's own access would end the process. It lets
go of the GIL once a call, where a pread for each row does so a row. For maps that cannot be guarded
(`raypipe.stream.guarded`); large rows are then read by pread (`raypipe.stream.mapped`).
A file that is cut and written again within one call of either may give zeros that nobody notices.

GB a processor-second on one core of a busy machine, rows in random order in the page cache; memcpy
reads no file, np.take reads the map:

===============  ======  =======  =====  =========
row              memcpy  np.take  pread  scattered
===============  ======  =======  =====  =========
962x768 float16    4.46     3.70   3.56       3.49
257x768 float32    5.13     4.17   3.24       3.07
768 float32        7.51     4.24   1.21       1.68
768 float16        8.59     4.27   0.60       0.93
===============  ======  =======  =====  =========
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys

import numpy as np

_MOST_SPANS = 1024  # UIO_MAXIOV: of one call


def copy_scattered(source: np.ndarray, rows: np.ndarray, out: np.ndarray) -> bool:
    """``source[rows]`` to ``out``: (n, bytes) uint8 of a map, (n,) ints of it, (n, bytes) uint8.

    False: not done, as the system has no such call, forbids it, or lacks a page of them (the file
    was cut short, or the disk fails); ``out`` then holds anything.
    """
    if _copy is None:
        return False
    width = source.shape[1]
    spans = np.empty((rows.size, 2), np.uint64)  # struct iovec: address, length
    spans[:, 0] = source.ctypes.data + rows.astype(np.int64) * width
    spans[:, 1] = width
    first, pid = out.ctypes.data, os.getpid()
    for lo in range(0, rows.size, _MOST_SPANS):
        count = min(_MOST_SPANS, rows.size - lo)
        to = _Span(first + lo * width, count * width)
        if _copy(pid, ctypes.byref(to), 1, spans[lo:].ctypes.data, count, 0) != count * width:
            return False
    return True


def consecutive(rows: np.ndarray) -> list[tuple[int, int]]:
    """Ranges [lo, hi) of places in ``rows`` (n,), n > 0, whose rows are neighbours, in order."""
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    return list(itertools.pairwise([0, *cuts.tolist(), rows.size]))


class _Span(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _find_copy() -> ctypes._NamedFuncPointer | None:
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None), "process_vm_readv", None)
    if function is None:
        return None
    function.argtypes = [
        ctypes.c_int,
        *(ctypes.c_void_p, ctypes.c_ulong),
        *(ctypes.c_void_p, ctypes.c_ulong),
        ctypes.c_ulong,
    ]
    function.restype = ctypes.c_ssize_t
    return function


_copy = _find_copy()
