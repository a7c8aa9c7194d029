"""The rows that every contender of benchmarks/stream.py reads, and their state in the page cache.

Each row begins with its own number, so that a batch tells which rows it holds and can be compared
with them, whoever delivered it and in whatever order.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WINDOW_BYTES = 64 * 2**20  # 16 pieces of 4 MiB: what a disk reads about as fast as any more
_NUMBER_BASE = 1024  # both digits of a row's number are exact in float16


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What is read: rows of ``row_shape``, ``batch`` at a time; ``suffix`` of its keys.

    cold_times : how many times as much of them the cold windows read: of a small file every page is
    there before its window comes, for a small row that is read brings pages around it.
    """

    row_shape: tuple[int, ...]
    dtype: str
    batch: int
    suffix: str = ""
    cold_times: int = 1

    @property
    def name(self) -> str:
        """``962x768 float16``."""
        return f"{'x'.join(map(str, self.row_shape))} {self.dtype}"

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.row_shape)) * np.dtype(self.dtype).itemsize

    @property
    def batch_bytes(self) -> int:
        """Bytes of one batch."""
        return self.row_bytes * self.batch

    @property
    def window(self) -> int:
        """Rows of a shuffle window of about ``WINDOW_BYTES``, a whole number of batches."""
        return max(1, round(WINDOW_BYTES / self.batch_bytes)) * self.batch

    def count(self, gigabytes: float) -> int:
        """Rows in so many GB (10**9), a whole number of batches, at least eight."""
        return max(8, round(gigabytes * 1e9 / self.batch_bytes)) * self.batch


# DINOv2 at 434 pixels; CLIP's tokens; one vector an image.
LARGE = Rows(row_shape=(962, 768), dtype="float16", batch=16)
TOKENS = Rows(row_shape=(257, 768), dtype="float32", batch=16, suffix="_257x768")
VECTORS = Rows(row_shape=(768,), dtype="float32", batch=256, suffix="_768", cold_times=2)


def make(path: Path, rows: Rows, n: int) -> Path:
    """``n`` rows as a ``.npy`` file, all different, on disk when this returns."""
    size = int(np.prod(rows.row_shape))
    rng = np.random.default_rng(0)
    pool = rng.standard_normal(size + 65_536, dtype=np.float32).astype(rows.dtype)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, _header(rows, n))
        for i in range(n):
            first = i * 7919 % 65_536
            row = pool[first : first + size].copy()
            row[:2] = divmod(i, _NUMBER_BASE)
            file.write(row.data)
        file.flush()
        os.fsync(file.fileno())
    return path


def make_sparse(path: Path, rows: Rows, n: int) -> Path:
    """``n`` rows of zeros that take no room. Raises OSError where the file system has a limit."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, _header(rows, n))
        file.truncate(file.tell() + n * rows.row_bytes)
    return path


def _header(rows: Rows, n: int) -> dict[str, object]:
    descr = np.lib.format.dtype_to_descr(np.dtype(rows.dtype))
    return {"descr": descr, "fortran_order": False, "shape": (n, *rows.row_shape)}


def check(batches: Iterable[np.ndarray], path: Path) -> None:
    """Stop unless each batch holds rows of the file, bit for bit, none of them twice."""
    mapped = np.load(path, mmap_mode="r")
    for batch in batches:
        flat = batch.reshape(len(batch), -1)
        numbers = (
            flat[:, 0].astype(np.int64) * _NUMBER_BASE + flat[:, 1].astype(np.int64)
        ).tolist()
        if len(set(numbers)) != len(numbers):
            raise SystemExit(f"a batch holds a row twice: {sorted(numbers)}")
        for number, row in zip(numbers, batch, strict=True):
            if not np.array_equal(row, mapped[number]):
                raise SystemExit(f"row {number} of a batch is not row {number} of the file")


def files_under(path: Path) -> list[Path]:
    """The file itself, or all files of a folder."""
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def heat(path: Path) -> None:
    """Read all of it once, so that it lies in the page cache."""
    buffer = bytearray(2**22)
    for file in files_under(path):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def chill(path: Path) -> None:
    """Ask the kernel to drop it from the page cache; what cannot be dropped stays."""
    for file in files_under(path):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_fraction(path: Path) -> float:
    """The part of it that lies in the page cache, by mincore."""
    libc = ctypes.CDLL(None, use_errno=True)
    inside = pages = 0
    for file in files_under(path):
        size = file.stat().st_size
        if not size:
            continue
        mapped = np.memmap(file, np.uint8, "r")
        flags = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        args = (ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(size))
        if libc.mincore(*args, ctypes.c_void_p(flags.ctypes.data)):
            raise OSError(ctypes.get_errno(), f"mincore of {file}")
        inside, pages = inside + int((flags & 1).sum()), pages + len(flags)
    return inside / max(pages, 1)
