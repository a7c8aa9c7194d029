"""One entry in the making: room, one pass into a spool, turn, flush, and its name last.

Whoever calls holds the entry's lock alone. What fails, fails clean: the folder goes, then the lock.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from raypipe.errors import ConfigError
from raypipe.read.nifti import SLAB_BYTES, Codec, slabs
from raypipe.store.durable import fsync_dir, pwrite_all, write_atomic
from raypipe.store.flocks import Flock
from raypipe.store.layout import CellGrid
from raypipe.store.space import explain_os_errors, preallocate
from raypipe.store.voxels.claim import Say, Wanted
from raypipe.store.voxels.entry import FORMAT, EntryManifest
from raypipe.store.voxels.gather import gathers
from raypipe.store.voxels.quota import alone, make_room
from raypipe.store.voxels.reader import VoxelStore
from raypipe.store.voxels.spool import Spool, cell_grid, turn
from raypipe.units import format_bytes, format_seconds

_MANIFEST_BYTES = 16 << 10  # without checksums, and what a folder takes


@dataclass(frozen=True, kw_only=True)
class BuildLimits:
    """What a build may take. block_bytes: of memory; quota_bytes: all entries together."""

    quota_bytes: int | None
    block_bytes: int

    def __post_init__(self) -> None:
        if self.quota_bytes is not None and self.quota_bytes < 1:
            raise ConfigError(f"cache quota {self.quota_bytes} is not above 0; None is no quota")
        if self.block_bytes < 1:
            raise ConfigError(f"block_bytes {self.block_bytes} is not above 0; give e.g. 24 MiB")


class Making:
    """``gather`` answers the first ROIs; ``finish`` makes the entry whole. Each is called once."""

    def __init__(
        self, wanted: Wanted, lock: Flock, limits: BuildLimits, codec: Codec, say: Say
    ) -> None:
        self._wanted, self._lock, self._limits = wanted, lock, limits
        self._codec, self._say = codec, say
        self._started = time.monotonic()
        scan = wanted.scan
        self._out = scan.dtype.newbyteorder("<")
        self._header = _npy_header(self._out, (wanted.voxels.size, scan.n_volumes))
        # The turn holds a band of voxels twice (before, after) in each of two threads.
        self._grid: CellGrid = cell_grid(
            wanted.voxels.size,
            scan.n_volumes,
            scan.dtype.itemsize,
            len(self._header),
            limits.block_bytes // 6,
        )
        self._files: list[int] = []
        self._data = self._spool = -1

    def gather(self, rois: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Make room, then the pass: everything into the spool, ``rois`` into memory."""
        with self._cleaning():
            taking = gathers(self._wanted.scan, rois)
            self._reserve()
            spool = Spool(self._wanted.scan, self._wanted.voxels, self._spool)
            slab_bytes = min(SLAB_BYTES, self._limits.block_bytes // 4)
            for slab in slabs(self._wanted.scan, slab_bytes, self._codec):
                spool.take(slab)
                for gather in taking.values():
                    gather.take(slab)
            return {name: gather.series for name, gather in taking.items()}

    def finish(self) -> VoxelStore:
        """Turn the spool, flush, name the entry; its lock is shared from then on."""
        paths = self._wanted.paths
        with self._cleaning():
            dtypes = self._wanted.scan.dtype, self._out
            sums = turn(self._spool, self._data, self._grid, *dtypes)
            os.fsync(self._data)
            self._close_files()
            (paths.building / "spool").unlink()
            write_atomic(paths.building / "voxels.npy", _npy(self._wanted.voxels))
            write_atomic(paths.building / "manifest.json", self._manifest(sums).to_bytes())
            os.utime(self._lock.fd)  # new: not the first that eviction takes
            paths.building.rename(paths.folder)
            fsync_dir(paths.cache)
        self._lock.share()
        store = VoxelStore.adopt(paths, self._lock)
        self._say(
            f"{self._wanted.scan.path.name}: cached {self._wanted.voxels.size} voxels, "
            f"{format_bytes(store.nbytes)}, in {format_seconds(time.monotonic() - self._started)} "
            f"({self._reader()}) at {paths.folder}"
        )
        return store

    def report(self, done: Future[VoxelStore]) -> None:
        """Say it when the entry was not finished: nobody may ask for it."""
        if (error := done.exception()) is not None:
            self._say(f"{self._wanted.scan.path.name}: not kept in the cache: {error}")

    def _reserve(self) -> None:
        paths = self._wanted.paths
        data = self._grid.file_bytes
        spool = data - len(self._header)
        need = data + 8 * self._wanted.voxels.size + _MANIFEST_BYTES + 24 * len(self._grid)
        with alone(paths.cache):
            make_room(
                paths.cache,
                need,
                spool,
                self._limits.quota_bytes,
                source=self._wanted.source,
                say=self._say,
            )
            # What a killed build of this very entry left: `make_room` could not have its lock.
            shutil.rmtree(paths.building, ignore_errors=True)
            paths.building.mkdir()
            self._data = self._new("data.npy", data)
            self._spool = self._new("spool", spool)
        pwrite_all(self._data, self._header, 0)

    def _new(self, name: str, size_bytes: int) -> int:
        path = self._wanted.paths.building / name
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self._files.append(fd)
        preallocate(fd, path, size_bytes)
        return fd

    @contextlib.contextmanager
    def _cleaning(self) -> Any:
        try:
            with explain_os_errors(self._wanted.paths.folder, 2 * self._grid.file_bytes):
                yield
        except BaseException:
            self._close_files()
            shutil.rmtree(self._wanted.paths.building, ignore_errors=True)
            self._wanted.paths.lock.unlink(missing_ok=True)
            self._lock.close()
            raise

    def _close_files(self) -> None:
        while self._files:
            os.close(self._files.pop())

    def _reader(self) -> str:
        return self._codec.name if self._wanted.scan.compressed else "not compressed"

    def _manifest(self, checksums: list[int]) -> EntryManifest:
        scan = self._wanted.scan
        return EntryManifest(
            format=FORMAT,
            source=self._wanted.source,
            mask_hash=self._wanted.mask,
            shape=scan.shape,
            n_voxels=int(self._wanted.voxels.size),
            dtype=self._out.str,
            slope=scan.slope,
            inter=scan.inter,
            affine=scan.affine.tolist(),
            tr_s=scan.tr_s,
            codec=self._reader(),
            cell_rows=self._grid.grid,
            checksums=checksums,
        )


def _npy_header(dtype: np.dtype[Any], shape: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    fields = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def _npy(voxels: np.ndarray) -> bytes:
    voxels = voxels.astype("<i8", copy=False)
    return _npy_header(voxels.dtype, voxels.shape) + voxels.tobytes()
