"""An entry of the cache, open for reading: any voxels' raw or scaled series.

While one is open, its entry is not removed: the lock is shared until `close`, or until this object
is gone. Pickled, it is a handle (cache folder and key), opened again where it lands.
"""

from __future__ import annotations

import os
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.errors import InputError, MissingInput, StoreCorrupt, StoreLocked
from raypipe.store.checksum import cell_checksums, read_full
from raypipe.store.flocks import Flock
from raypipe.store.layout import CellGrid, read_npy_header
from raypipe.store.voxels.entry import EntryManifest, EntryPaths
from raypipe.store.voxels.plan import ReadPlan, read_plan

# float64 of the rows that are scaled at a time: as much as stays in the L2 cache.
_SCALE_BYTES = 512 << 10


class VoxelStore:
    """Voxel-major values of one scan.

    voxels  : (n_voxels,) int64, ascending C-order flat indices that can be read
    shape   : (x, y, z, t) of the scan
    dtype   : of the raw values
    """

    def __init__(self, paths: EntryPaths, lock: Flock) -> None:
        """Of a whole entry, whose lock is shared (use `open`)."""
        self.paths, self.key = paths, paths.key
        self._lock = lock
        self._map: np.ndarray | None = None
        self.manifest = EntryManifest.read(paths.manifest)
        self.shape, self.tr_s = self.manifest.shape, self.manifest.tr_s
        self.slope, self.inter = self.manifest.slope, self.manifest.inter
        self.affine = np.array(self.manifest.affine)
        self._fd = os.open(paths.folder / "data.npy", os.O_RDONLY)
        self._finalizer = weakref.finalize(self, _let_go, lock, self._fd)
        try:
            self.dtype, self._offset = self._check_data()
            self.voxels = np.load(paths.folder / "voxels.npy", mmap_mode="r")
        except BaseException:
            self.close()
            raise
        os.utime(lock.fd)  # the time of last use: what eviction goes by

    @classmethod
    def open(cls, cache: Path, key: str, patience_s: float = 10.0) -> VoxelStore:
        """The entry ``key``; MissingInput when it is not there (any more)."""
        paths = EntryPaths(cache=cache, key=key)
        deadline = time.monotonic() + patience_s
        while True:
            try:
                lock = Flock(paths.lock, create=paths.manifest.exists())
            except FileNotFoundError:
                raise _absent(paths) from None
            if lock.try_share() and lock.is_current():
                break
            lock.close()
            if time.monotonic() > deadline:
                raise StoreLocked(f"cache entry {paths.folder} is being built; wait for it")
            time.sleep(0.02)
        if paths.manifest.exists():
            return cls.adopt(paths, lock)
        lock.close()
        raise _absent(paths)

    @classmethod
    def adopt(cls, paths: EntryPaths, lock: Flock) -> VoxelStore:
        """The whole entry behind a lock that the caller shares; ours from here on."""
        try:
            return cls(paths, lock)
        except BaseException:
            lock.close()
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        return VoxelStore.open, (self.paths.cache, self.key)

    def __enter__(self) -> VoxelStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the entry; again is no harm."""
        self._map = None
        self._finalizer()

    @property
    def n_volumes(self) -> int:
        """Length of a series."""
        return self.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of all series."""
        return self.manifest.n_voxels * self._row_bytes

    def read(self, voxels: np.ndarray, *, use_memmap: bool = True) -> np.ndarray:
        """(n, n_volumes) raw values of the flat indices ``voxels`` (n,), in that order.

        Repeats are allowed. Raises InputError for voxels that the mask left out.
        """
        self._ready()
        rows = self._rows(np.asarray(voxels, dtype=np.int64))
        plan = read_plan(rows, self._row_bytes, use_memmap=use_memmap)
        out = np.empty((plan.rows.size, self.n_volumes), self.dtype)
        if plan.way == "memmap":
            np.take(self._mapped(), plan.rows, axis=0, out=out, mode="clip")
        else:
            self._pread(plan, out)
        return out if plan.give_out is None else out[plan.give_out]

    def scaled(self, voxels: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
        """(n, n_volumes) values raw * slope + inter, worked out in float64, given as ``dtype``."""
        raw = self.read(voxels)
        return scale(raw, self.slope, self.inter, dtype)

    def verify(self) -> None:
        """Read everything; StoreCorrupt when a byte is not what was written."""
        self._ready()
        grid = CellGrid(
            rows=self.manifest.n_voxels,
            grid=self.manifest.cell_rows,
            row_bytes=self._row_bytes,
            data_offset=self._offset,
        )
        for cell, found in cell_checksums(self._fd, grid, range(len(grid))):
            if found != self.manifest.checksums[cell]:
                lo, hi = grid.range(cell)
                raise StoreCorrupt(
                    f"cache entry {self.paths.folder}: voxels {lo} to {hi - 1} are not what was "
                    "written; remove the folder, it is built again"
                )

    @property
    def _row_bytes(self) -> int:
        return self.n_volumes * int(self.dtype.itemsize)

    def _ready(self) -> None:
        if not self._finalizer.alive:
            raise InputError(f"cache entry {self.paths.folder} is closed here; open it again")
        if self._lock.fd < 0:  # a forked child: its parent's lock is not its own
            self._relock()

    def _relock(self) -> None:
        fresh = VoxelStore.open(self.paths.cache, self.key)
        self._finalizer.detach()
        os.close(self._fd)
        self.__dict__.update(fresh.__dict__)
        fresh._finalizer.detach()
        self._finalizer = weakref.finalize(self, _let_go, self._lock, self._fd)

    def _check_data(self) -> tuple[np.dtype[Any], int]:
        path = self.paths.folder / "data.npy"
        with path.open("rb") as file:
            dtype, shape, offset = read_npy_header(file, str(path))
            size = os.fstat(file.fileno()).st_size
        wanted = (self.manifest.n_voxels, self.n_volumes)
        if shape != wanted or size != offset + dtype.itemsize * wanted[0] * wanted[1]:
            raise StoreCorrupt(
                f"{path} has shape {shape} and {size} bytes, its manifest says {wanted}; "
                f"remove {self.paths.folder}, it is built again"
            )
        return dtype, offset

    def _rows(self, flat: np.ndarray) -> np.ndarray:
        if self.voxels.size == self.shape[0] * self.shape[1] * self.shape[2]:
            rows, inside = flat, (flat >= 0) & (flat < self.voxels.size)
        else:
            rows = np.searchsorted(self.voxels, flat)
            rows = np.minimum(rows, self.voxels.size - 1)
            inside = self.voxels[rows] == flat
        if not inside.all():
            raise InputError(
                f"{np.count_nonzero(~inside)} of {flat.size} voxels lie outside the mask that the "
                f"cache of {self.manifest.source['path']} was built with; mask the ROI with it, or "
                "build with a mask that holds the ROI"
            )
        return rows

    def _mapped(self) -> np.ndarray:
        if self._map is None:
            self._map = np.load(self.paths.folder / "data.npy", mmap_mode="r").view(np.ndarray)
        return self._map

    def _pread(self, plan: ReadPlan, out: np.ndarray) -> None:
        row_bytes, view = self._row_bytes, out.view(np.uint8).reshape(-1).data
        starts = plan.starts.tolist()
        offsets = (self._offset + plan.rows[plan.starts[:-1]] * row_bytes).tolist()
        for k, offset in enumerate(offsets):
            into = view[starts[k] * row_bytes : starts[k + 1] * row_bytes]
            if os.preadv(self._fd, [into], offset) != len(into) and (
                read_full(self._fd, into, offset) != len(into)
            ):
                raise StoreCorrupt(f"cache entry {self.paths.folder} ends early; remove the folder")


def scale(raw: np.ndarray, slope: float, inter: float, dtype: Any = np.float32) -> np.ndarray:
    """``raw * slope + inter`` of (n, t) values, rounded once, to ``dtype``.

    In float32 throughout, an intercept that cancels the rest would leave few true digits.
    """
    dtype = np.dtype(dtype)
    if (slope, inter) == (1.0, 0.0):
        return raw.astype(dtype, copy=False)
    out = np.empty(raw.shape, dtype)
    step = max(1, _SCALE_BYTES // (8 * max(1, raw.shape[1])))
    wide = np.empty((min(step, len(raw)), raw.shape[1]))
    for lo in range(0, len(raw), step):
        part = raw[lo : lo + step]
        exact = wide[: len(part)]
        np.multiply(part, slope, out=exact, dtype=np.float64)
        np.add(exact, inter, out=exact)
        out[lo : lo + step] = exact
    return out


def _absent(paths: EntryPaths) -> MissingInput:
    return MissingInput(
        f"cache entry {paths.folder} is not there; it was removed to make room: build it again"
    )


def _let_go(lock: Flock, fd: int) -> None:
    os.close(fd)
    lock.close()
