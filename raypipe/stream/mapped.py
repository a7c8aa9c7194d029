"""A source's file, open and mapped read-only in this process; rows are copied out without the GIL.

Touching a map beyond the end of a file that was cut short is SIGBUS, which ends the process. So the
map is a guarded one (`raypipe.stream.guarded`), and after each copy it is asked whether it was cut.
Where there is no guard, the kernel copies the rows (pread, `raypipe.stream.scatter`), which is
slower, small rows the more so, and says where there is nothing to copy. Either way a file that was
seen cut short is not trusted again until it is opened again.

GB a processor-second of `take` in one thread, rows in random order in the page cache; memcpy reads
no file, np.take reads a map and nothing else:

===============  ======  =======  =======  ======
row, batch       memcpy  np.take  guarded  kernel
===============  ======  =======  =======  ======
962x768 f16, 16    7.03     7.44     7.61    5.73
257x768 f32, 16    8.12     7.95     7.78    6.09
768 f32, 256       7.49     5.03     4.93    1.66
768 f16, 256       9.77     7.08     6.16    1.30
===============  ======  =======  =======  ======

Cold pages are asked for ahead by `ask_for`. It uses posix_fadvise: for a file, madvise(WILLNEED) is
the same request to the kernel, but Python's holds the GIL meanwhile.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import sys
import weakref

import numpy as np

from raypipe.errors import ConfigError, MissingInput, StoreCorrupt
from raypipe.memory.guard import on_relief
from raypipe.store.checksum import read_full
from raypipe.stream.guarded import guard
from raypipe.stream.rows import runs_of
from raypipe.stream.scatter import consecutive, copy_scattered
from raypipe.stream.source import ArraySource

# A longer request is cut by the kernel without a word to the device's read-ahead (128 KiB unless
# set otherwise): force_page_cache_readahead in mm/readahead.c.
_REQUEST = 128 << 10
# From here on a run of neighbours is read by a call of its own: below, calls cost too much.
_LARGE_RUN_BYTES = 32 << 10
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
            raise StoreCorrupt(_too_short(source, 0)) from error
        self._maps = [self._map]
        self._seen_short = False
        # As bytes: one path for all dtypes, and np.take copies a misaligned array whole. In nobody
        # else's hands: who does not look at the guard after a copy would take zeros for rows.
        self._bytes = _rows_of(self._map, source)
        self._start = self._bytes.ctypes.data - source.offset
        self._guard = guard(self._start, len(self._map))
        if self._guard is not None:
            # Called before the attributes are let go of, and with the last of them the map.
            weakref.finalize(self, self._guard.release)
        self._mincore = _mincore(self._fd)
        on_relief(self)

    @functools.cached_property
    def array(self) -> np.ndarray:
        """The rows, (n_rows, *row_shape) of the stored dtype, read-only, not copied.

        A map of its own, without a guard: a file that is cut short under it is SIGBUS, not zeros.
        Raises StoreCorrupt.
        """
        self._check_whole()
        self._maps.append(mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ))
        rows = _rows_of(self._maps[-1], self.source)
        return rows.view(self.source.stored_dtype).reshape(self.source.shape)

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy ``rows`` (n,) into ``out`` (n, row_bytes) uint8, contiguous.

        Raises ConfigError for a row that the file does not have, StoreCorrupt when the file was cut
        short since it was mapped, even in the middle of this call, or when the disk fails; ``out``
        then holds anything.
        """
        if rows.size == 0:
            return
        self.check(rows)
        if self._guard is None:
            self._take_by_kernel(rows, out)
        else:  # the range was checked: mode "raise" would copy through a second buffer
            self._bytes.take(rows, axis=0, out=out, mode="clip")
        self._check_whole()

    def part(self, row: int, first: int, out: np.ndarray) -> None:
        """Copy bytes of ``row``, from its byte ``first`` on, to ``out`` (bytes,); as `take`."""
        if self._guard is None:
            self._read(self.source.offset + row * self.source.row_bytes + first, out)
        else:
            out[:] = self._bytes[row, first : first + out.size]
        self._check_whole()

    def check(self, rows: np.ndarray) -> None:
        """Raise as `take` unless ``rows`` (n,), n > 0, can be read now."""
        if rows.min() < 0 or rows.max() >= self.source.n_rows:
            raise ConfigError(
                f"rows {rows.min()}..{rows.max()} asked of {self.source.path}, which has "
                f"{self.source.n_rows}; was the split made for another store?"
            )
        if self._guard is not None:
            self._guard.renew()
        self._check_whole()

    def resident(self, rows: np.ndarray) -> bool | None:
        """Whether ``rows`` seem to be in the page cache, by a sample of them; None: cannot tell.

        Linux tells only those who own the file or may write it.
        """
        if self._mincore is None or rows.size == 0:
            return None
        sample = rows[:: max(1, rows.size // _SAMPLE)][:_SAMPLE]
        start, page = self._bytes.ctypes.data, mmap.PAGESIZE
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
            for each in self._maps:
                each.madvise(mmap.MADV_DONTNEED)

    def _inside(self, rows: np.ndarray) -> np.ndarray:
        """The rows that there are: for hints, which report nothing."""
        return rows[(rows >= 0) & (rows < self.source.n_rows)]

    def _take_by_kernel(self, rows: np.ndarray, out: np.ndarray) -> None:
        width, runs = self.source.row_bytes, consecutive(rows)
        small = out.nbytes < len(runs) * _LARGE_RUN_BYTES
        if small and copy_scattered(self._bytes, rows, out):
            return
        for lo, hi in runs:  # what is wrong after a failed copy is told by the read
            self._read(self.source.offset + int(rows[lo]) * width, out[lo:hi])

    def _read(self, at: int, out: np.ndarray) -> None:
        try:
            count = read_full(self._fd, memoryview(out.reshape(-1).data), at)
        except OSError as error:
            raise StoreCorrupt(_unreadable(self.source, at, error)) from error
        if count < out.size:
            self._seen_short = True
            self._check_whole()

    def _check_whole(self) -> None:
        """Raise StoreCorrupt if the file is too short, or was when somebody looked or copied."""
        size = self._map.size()
        cut_at = None if self._guard is None else self._guard.cut_at
        if size < self.source.end_byte:
            self._seen_short = True
            raise StoreCorrupt(_too_short(self.source, size))
        if cut_at is not None and not self._seen_short:  # or the disk has failed
            try:
                os.pread(self._fd, 1, cut_at - self._start)
            except OSError as error:
                at = cut_at - self._start
                raise StoreCorrupt(_unreadable(self.source, at, error)) from error
        if cut_at is not None or self._seen_short:
            raise StoreCorrupt(
                f"{self.source.path} was cut short while it was open and has {size} bytes again; "
                "extract or copy it again and open it again"
            )


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


def _rows_of(whole: mmap.mmap, source: ArraySource) -> np.ndarray:
    """The rows in the map of a file: (n_rows, row_bytes) uint8. Raises StoreCorrupt (truncated)."""
    if len(whole) < source.end_byte:  # as it was when it was mapped
        raise StoreCorrupt(_too_short(source, len(whole)))
    flat = np.frombuffer(whole, np.uint8, source.n_rows * source.row_bytes, source.offset)
    return flat.reshape(source.n_rows, source.row_bytes)


def _unreadable(source: ArraySource, at: int, error: OSError) -> str:
    return f"{source.path} cannot be read at byte {at} ({error.strerror}); extract or copy it again"


def _too_short(source: ArraySource, size: int) -> str:
    return (
        f"{source.path} holds {size} bytes, its {source.n_rows} rows need {source.end_byte}; "
        "it was cut short: extract or copy it again"
    )
