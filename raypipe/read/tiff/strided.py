"""Rows out of an open file by pread: a crop of plain values, as its bytes.

A crop that is as wide as the image is one read. Rows of a narrower one lie apart in the file: a read
each, or, where the gaps are short, one read with the gaps in it. 512 rows of 1,024 bytes from the
page cache took 0.6 ms as reads of their own, with gaps of 2, 8 and 15 KB in between 0.2, 0.4 and
0.6 ms (best of seven, a busy machine); a fresh map took 0.1 ms, but see ``opened``.
"""

from __future__ import annotations

import os

import numpy as np

from raypipe.errors import InputError

# What lies between two rows is read with them if copying it costs less than a call.
_GAP_BYTES = 8 << 10
_BLOCK_BYTES = 256 << 10  # 1 MiB is fresh pages from the kernel each time: three times as slow


def copy_rows(fd: int, path: str, out: np.ndarray, start: int, row_bytes: int) -> None:
    """``out`` (rows, width) uint8, contiguous, from rows that begin ``row_bytes`` apart.

    Raises InputError for a file that ends before, or cannot be read.
    """
    rows, width = out.shape
    if width == row_bytes:
        fill(fd, path, out.reshape(-1), start)
    elif row_bytes - width > _GAP_BYTES:
        for k in range(rows):
            fill(fd, path, out[k], start + k * row_bytes)
    else:
        _fill_with_gaps(fd, path, out, start, row_bytes)


def _fill_with_gaps(fd: int, path: str, out: np.ndarray, start: int, row_bytes: int) -> None:
    width = out.shape[1]
    together = max(1, _BLOCK_BYTES // row_bytes)
    for k in range(0, len(out), together):
        some = out[k : k + together]
        block = np.empty(len(some) * row_bytes, np.uint8)
        # No gap after the last row: the file may end there.
        fill(fd, path, block[: block.size - row_bytes + width], start + k * row_bytes)
        some[:] = block.reshape(-1, row_bytes)[:, :width]


def fill(fd: int, path: str, out: np.ndarray, at: int) -> None:
    """``out`` (bytes,) uint8, contiguous, from byte ``at`` on. Raises InputError as above."""
    view, got = out.data, 0
    while got < len(view):
        try:
            n = os.preadv(fd, [view[got:]], at + got)
        except OSError as error:
            raise InputError(
                f"{path} cannot be read at byte {at + got} ({error.strerror}); copy it again"
            ) from error
        if not n:
            raise InputError(
                f"{path} was cut short while it was open: it ends before byte {at + len(view)}; "
                "copy it again and open the stack again"
            )
        got += n
