"""One pass over the data of a ``.npy`` that is to be adopted: checksums, and rows that are not finite.

By several threads, in about 2 MiB a thread whatever the file. What becomes of it is `adoption`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import xxhash

from raypipe.errors import StoreCorrupt
from raypipe.store.checksum import ask_ahead, cell_tasks, default_threads, read_full
from raypipe.store.layout import FILE_DTYPES, CellGrid

_READ_BYTES = 1 << 20  # a multiple of every itemsize
# All exponent bits set is NaN or infinity; then any bit of the fraction makes it a NaN.
_EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF << 52}
_FRACTION = {"float16": 0x03FF, "bfloat16": 0x007F, "float32": 0x007FFFFF, "float64": 2**52 - 1}


@dataclass
class CellScan:
    """One cell: checksum of its bytes; bad: row -> [NaNs, infinities], only rows that have any."""

    cell: int
    checksum: int
    bad: dict[int, list[int]] = field(default_factory=dict)


def scan_cells(fd: int, grid: CellGrid, dtype: str, threads: int | None) -> Iterator[CellScan]:
    """Every cell of the open file, in order. Raises StoreCorrupt when the file ends early."""
    tasks = cell_tasks(grid, range(len(grid)))
    with ThreadPoolExecutor(threads or default_threads()) as pool:
        for found in pool.map(lambda task: _scan_task(fd, grid, dtype, task), tasks):
            yield from found


def reason_of(nans: int, infinities: int) -> str:
    """What the index says of a row that is not finite."""
    named = [f"{n} {what}" for n, what in ((nans, "NaN"), (infinities, "inf")) if n]
    return f"not finite: {', '.join(named)}"


def _scan_task(fd: int, grid: CellGrid, dtype: str, cells: Sequence[int]) -> list[CellScan]:
    ask_ahead(fd, grid, cells)
    scratch = _Scratch(dtype)
    return [_scan_cell(fd, grid, cell, scratch) for cell in cells]


class _Scratch:
    """A thread's buffers, and the search for values that are not finite."""

    def __init__(self, dtype: str) -> None:
        itemsize = FILE_DTYPES[dtype].itemsize
        self.bytes = memoryview(bytearray(_READ_BYTES))
        self._kind = np.dtype(f"<u{itemsize}")
        self._exponent = self._kind.type(_EXPONENT.get(dtype, 0))
        self._fraction = self._kind.type(_FRACTION.get(dtype, 0))
        self._masked = np.empty(_READ_BYTES // itemsize, self._kind)
        self.itemsize = itemsize

    def not_finite(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(places, whether NaN) of values in the first ``length`` bytes that are not finite."""
        if not self._exponent:  # integers and bool always are
            return np.empty(0, np.intp), np.empty(0, bool)
        bits = np.frombuffer(self.bytes[:length], self._kind)
        masked = np.bitwise_and(bits, self._exponent, out=self._masked[: len(bits)])
        if masked.max() != self._exponent:
            return np.empty(0, np.intp), np.empty(0, bool)
        places = np.flatnonzero(masked == self._exponent)
        return places, (bits[places] & self._fraction) != 0


def _scan_cell(fd: int, grid: CellGrid, cell: int, scratch: _Scratch) -> CellScan:
    start, left = grid.extent(cell)
    bad: dict[int, list[int]] = {}
    hasher = xxhash.xxh3_64()
    offset = start
    while left:
        length = min(left, _READ_BYTES)
        if read_full(fd, scratch.bytes[:length], offset) < length:
            raise StoreCorrupt(
                f"the file became shorter than {grid.file_bytes} bytes while it was read; adopt it "
                "again once nobody writes it"
            )
        hasher.update(scratch.bytes[:length])
        places, is_nan = scratch.not_finite(length)
        rows = (offset - grid.data_offset + places * scratch.itemsize) // grid.row_bytes
        for row, nan in zip(rows.tolist(), is_nan.tolist(), strict=True):
            bad.setdefault(row, [0, 0])[0 if nan else 1] += 1
        offset, left = offset + length, left - length
    return CellScan(cell, hasher.intdigest(), bad)
