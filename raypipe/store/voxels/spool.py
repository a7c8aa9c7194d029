"""From volume-major to voxel-major in bounded memory: a spool of masked volumes, then turned.

The pass appends each volume's masked voxels to a spool file, as they come. `turn` then reads a
band of voxels out of every volume, transposes it in memory, and writes it as one long run. Written
straight to their places, the pieces of 26 volumes (24 MiB) would be three million writes of 104
bytes; for 300 MB the spool costs 0.2 s of processor time (beside the unpacking), the turn and its
flush 0.7 s. Everything is written with pwrite:
a full disk is an error here, not a signal.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import numpy as np
import xxhash

from raypipe.errors import StoreCorrupt
from raypipe.read.nifti import Scan, Slab
from raypipe.store.checksum import default_threads, read_full
from raypipe.store.durable import pwrite_all
from raypipe.store.layout import CellGrid
from raypipe.store.voxels.gather import Picker


class Spool:
    """Writes the masked volumes of ``scan`` to ``fd``: (n_volumes, n_voxels) in stored dtype."""

    def __init__(self, scan: Scan, voxels: np.ndarray, fd: int) -> None:
        self._picker, self._fd = Picker(scan, voxels), fd

    def take(self, slab: Slab) -> None:
        """Add what ``slab`` holds."""
        for t, row in self._picker.rows(slab):
            pwrite_all(self._fd, row.view(np.uint8).data, t * row.nbytes)


def cell_grid(
    n_voxels: int, n_volumes: int, itemsize: int, offset: int, cell_bytes: int
) -> CellGrid:
    """Bands of voxels of about ``cell_bytes``, at least one voxel each."""
    row_bytes = n_volumes * itemsize
    return CellGrid(
        rows=n_voxels,
        grid=max(1, min(n_voxels, cell_bytes // row_bytes)),
        row_bytes=row_bytes,
        data_offset=offset,
    )


def turn(source: int, target: int, grid: CellGrid, stored: np.dtype, out: np.dtype) -> list[int]:
    """Transpose the spool into ``target``, cell by cell; the checksum of each cell (xxh3_64).

    Two cells are held for each thread: as read, (n_volumes, n) ``stored``, and as written,
    (n, n_volumes) ``out``.
    """
    threads = min(default_threads(), 2)
    cell_bytes = grid.grid * grid.row_bytes
    buffers: SimpleQueue[tuple[np.ndarray, np.ndarray]] = SimpleQueue()
    for _ in range(threads):
        buffers.put((np.empty(cell_bytes, np.uint8), np.empty(cell_bytes, np.uint8)))

    def one(cell: int) -> int:
        pair = buffers.get()
        try:
            return _turn_cell(source, target, grid, cell, (stored, out), pair)
        finally:
            buffers.put(pair)

    with ThreadPoolExecutor(threads, "raypipe-turn") as pool:
        jobs = [pool.submit(one, cell) for cell in range(len(grid))]
        try:
            return [job.result() for job in jobs]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _turn_cell(
    source: int,
    target: int,
    grid: CellGrid,
    cell: int,
    dtypes: tuple[np.dtype, np.dtype],
    buffers: tuple[np.ndarray, np.ndarray],
) -> int:
    (stored, out), (lo, hi) = dtypes, grid.range(cell)
    offset, nbytes = grid.extent(cell)
    came, gone = buffers[0][:nbytes], buffers[1][:nbytes]
    piece, volume_bytes = (hi - lo) * stored.itemsize, grid.rows * stored.itemsize
    view = came.data
    for t in range(nbytes // piece):
        at = t * volume_bytes + lo * stored.itemsize
        if read_full(source, view[t * piece : (t + 1) * piece], at) < piece:
            raise StoreCorrupt(f"the spool ends before byte {at + piece}; build the entry again")
    turned = gone.view(out).reshape(hi - lo, -1)
    np.copyto(turned, came.view(stored).reshape(-1, hi - lo).T)
    pwrite_all(target, gone.data, offset)
    return int(xxhash.xxh3_64_intdigest(gone.data))
