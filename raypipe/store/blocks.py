"""A sealed shard's rows in order, block by block in bounded memory, each cell checked on the way.

What leaves a store (`export`) has been held against its checksums: damage is an error there, not a
value in somebody's table. Reads with preadv: a file that is cut short is StoreCorrupt, not SIGBUS.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from raypipe.errors import StoreCorrupt
from raypipe.store.checksum import read_full
from raypipe.store.layout import FILE_DTYPES
from raypipe.store.manifest import Manifest

if TYPE_CHECKING:
    import pyarrow as pa


def checked_blocks(
    path: Path, manifest: Manifest, block_rows: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, rows (n, *row_shape) of the dtype in the file), valid until the next is asked for.

    A cell is checked by the block that ends it, so only the last block makes all of them good.
    Raises StoreCorrupt that names the rows.
    """
    grid, expected = manifest.cells, manifest.checksums
    buffer = memoryview(bytearray(block_rows * grid.row_bytes))
    hasher = xxhash.xxh3_64()
    fd = os.open(path, os.O_RDONLY)
    try:
        for lo in range(0, grid.rows, block_rows):
            hi = min(lo + block_rows, grid.rows)
            data = buffer[: (hi - lo) * grid.row_bytes]
            if read_full(fd, data, grid.data_offset + lo * grid.row_bytes) < len(data):
                raise StoreCorrupt(f"{path} ends before row {hi}; it was cut short: restore it")
            at = lo
            while at < hi:
                cell = at // grid.grid
                end = min(hi, grid.range(cell)[1])
                hasher.update(data[(at - lo) * grid.row_bytes : (end - lo) * grid.row_bytes])
                if end == grid.range(cell)[1]:
                    _check(path, grid.range(cell), hasher.intdigest() == expected[cell])
                    hasher.reset()
                at = end
            flat = np.frombuffer(data, FILE_DTYPES[manifest.dtype])
            yield lo, flat.reshape(hi - lo, *manifest.shape[1:])
    finally:
        os.close(fd)


def _check(path: Path, rows: tuple[int, int], same: bool) -> None:
    if not same:
        raise StoreCorrupt(
            f"{path} is damaged in rows [{rows[0]}, {rows[1]}): other bytes than were sealed; see "
            "raypipe store verify, restore it from a copy"
        )


class IndexCursor:
    """The index of a shard, taken from the front some rows at a time."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path = path
        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise StoreCorrupt(f"index {path} cannot be read ({error}); restore it") from None
        self.rows = self._file.metadata.num_rows
        groups = range(self._file.num_row_groups)
        self.plain_bytes = sum(self._file.metadata.row_group(g).total_byte_size for g in groups)
        self._batches = self._file.iter_batches(1 << 16)
        self._held = self._file.schema_arrow.empty_table()

    def take(self, rows: int) -> pa.Table:
        """The next ``rows`` rows."""
        import pyarrow as pa

        while self._held.num_rows < rows:
            more = next(self._batches, None)
            if more is None:
                raise StoreCorrupt(f"index {self._path} has fewer rows than its shard; restore it")
            self._held = pa.concat_tables([self._held, pa.Table.from_batches([more])])
        taken, self._held = self._held[:rows], self._held[rows:]
        return taken

    def longest(self, column: str) -> int:
        """Most UTF-8 bytes in a value of ``column``."""
        import pyarrow.compute as pc

        batches = self._file.iter_batches(1 << 16, columns=[column])
        longest = (pc.max(pc.binary_length(batch.column(0))).as_py() or 0 for batch in batches)
        return max(longest, default=0)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
