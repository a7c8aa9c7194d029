"""A source's file, mapped read-only in this process; rows are copied out of it without the GIL.

Touching a map beyond the end of a file that was cut short is SIGBUS; so the size is checked when
the file is mapped and again before every copy (what is cut off during a copy, or fails on the disk
itself, still is one).

Cold pages are asked for ahead by `ask_for`. It uses posix_fadvise: for a file, madvise(WILLNEED) is
the same request to the kernel, but Python's holds the GIL meanwhile.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import weakref

import numpy as np

from raypipe.errors import ConfigError, MissingInput, StoreCorrupt
from raypipe.memory.guard import on_relief
from raypipe.stream.rows import runs_of
from raypipe.stream.source import ArraySource

# A longer request is cut by the kernel without a word to the device's read-ahead (128 KiB unless
# set otherwise): force_page_cache_readahead in mm/readahead.c.
_REQUEST = 128 << 10
# Rows looked at to tell whether a batch is in the page cache: 2 us each.
_SAMPLE = 4


class MappedRows:
    """A read-only map of one source. Raises MissingInput, StoreCorrupt (truncated)."""

    def __init__(self, source: ArraySource) -> None:
        self.source = source
        try:
            self._fd = os.open(source.path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise MissingInput(f"{source.path} is not there; extract or copy it first") from error
        weakref.finalize(self, os.close, self._fd)
        try:
            self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # an empty file cannot be mapped
            raise StoreCorrupt(_truncated(source, 0)) from error
        self._check_size()
        count = source.n_rows * source.row_bytes
        flat = np.frombuffer(self._map, np.uint8, count, source.offset)
        # As bytes: one path for all dtypes, and np.take copies a misaligned array whole.
        self.bytes = flat.reshape(source.n_rows, source.row_bytes)
        self._mincore = _mincore(self._fd)
        on_relief(self)

    @property
    def array(self) -> np.ndarray:
        """The rows, (n_rows, *row_shape) of the stored dtype, read-only, not copied."""
        return self.bytes.view(self.source.stored_dtype).reshape(self.source.shape)

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy ``rows`` (n,) into ``out`` (n, row_bytes) uint8.

        Raises ConfigError for a row that the file does not have, StoreCorrupt when the file was cut
        short since it was mapped.
        """
        rows = np.asarray(rows, dtype=np.intp)
        if rows.size:
            self.check(rows)
            # The range is checked above: mode "raise" would copy through a second buffer.
            np.take(self.bytes, rows, axis=0, out=out, mode="clip")

    def part(self, row: int, first: int, out: np.ndarray) -> None:
        """Copy bytes of ``row``, from its byte ``first`` on, to ``out`` (bytes,); as `take`."""
        out[:] = self.bytes[row, first : first + out.size]

    def check(self, rows: np.ndarray) -> None:
        """Raise as `take` unless ``rows`` (n,), n > 0, can be read now."""
        if rows.min() < 0 or rows.max() >= self.source.n_rows:
            raise ConfigError(
                f"rows {rows.min()}..{rows.max()} asked of {self.source.path}, which has "
                f"{self.source.n_rows}; was the split made for another store?"
            )
        self._check_size()

    def resident(self, rows: np.ndarray) -> bool | None:
        """Whether ``rows`` seem to be in the page cache, by a sample of them; None: cannot tell.

        Linux tells only those who own the file or may write it.
        """
        if self._mincore is None or rows.size == 0:
            return None
        sample = rows[:: max(1, rows.size // _SAMPLE)][:_SAMPLE]
        start, page = self.bytes.ctypes.data, mmap.PAGESIZE
        held = ctypes.c_ubyte()
        for row in self._inside(sample).tolist():
            place = start + row * self.source.row_bytes + self.source.row_bytes // 2
            if self._mincore(place & -page, page, ctypes.byref(held)) or not held.value & 1:
                return False
        return True

    def ask_for(self, rows: np.ndarray) -> None:
        """Have the kernel start reading ``rows``, in the order of the file; does not wait for it."""
        if not hasattr(os, "posix_fadvise"):
            return
        width = self.source.row_bytes
        for lo, hi in runs_of(np.sort(self._inside(rows))):
            end = self.source.offset + hi * width
            for at in range(self.source.offset + lo * width, end, _REQUEST):
                os.posix_fadvise(self._fd, at, min(_REQUEST, end - at), os.POSIX_FADV_WILLNEED)

    def expect_jumps(self) -> None:
        """Reading will be in random order: where that saves reading, fault single pages in."""
        if reads_too_much(self.source.row_bytes, self._map.size(), _ram_bytes()) and hasattr(
            mmap, "MADV_RANDOM"
        ):
            self._map.madvise(mmap.MADV_RANDOM)

    def give_back(self) -> None:
        """Let go of the pages that this process has touched; they are read again when needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _inside(self, rows: np.ndarray) -> np.ndarray:
        """The rows that there are: for hints, which report nothing."""
        return rows[(rows >= 0) & (rows < self.source.n_rows)]

    def _check_size(self) -> None:
        if self._map.size() < self.source.end_byte:
            raise StoreCorrupt(_truncated(self.source, self._map.size()))


def reads_too_much(row_bytes: int, file_bytes: int, ram_bytes: int) -> bool:
    """Whether the kernel's reading around a fault (128 KiB) is a waste for rows in random order.

    It is for small rows of a file that the page cache cannot keep: what is read around them is
    dropped before it is used. In a file that fits, it fills the cache in large requests.
    """
    return row_bytes < _REQUEST // 4 and file_bytes > ram_bytes // 2


def _ram_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _mincore(fd: int) -> ctypes._NamedFuncPointer | None:
    """The system's mincore, where its answer about this file is the truth."""
    if sys.platform != "linux":
        return None
    owner = os.fstat(fd).st_uid
    if os.geteuid() not in (0, owner) and not os.access(f"/proc/self/fd/{fd}", os.W_OK):
        return None  # the kernel would call every page resident
    function = ctypes.CDLL(None).mincore
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return function


def _truncated(source: ArraySource, size: int) -> str:
    return (
        f"{source.path} holds {size} bytes, its {source.n_rows} rows need {source.end_byte}; "
        "it was cut short: extract or copy it again"
    )
