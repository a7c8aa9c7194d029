"""Where tiles of a result go: a ``.npy``, a tiled BigTIFF or OME-TIFF, a Zarr array.

Each is made whole in size before the first tile, so that a full disk shows then, and takes tiles in any
order from many processes. Reading a tile back serves to check what an earlier run committed. The order
in a file is (frames, channels, planes, rows, cols), less the axes that the image has not.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from raypipe.errors import ConfigError, InputError
from raypipe.store.durable import fsync_dir, pwrite_all
from raypipe.store.space import preallocate
from raypipe.tile.bigtiff import BigTiff
from raypipe.tile.grid import Box, TileGrid, round_up

KINDS = {".npy": "npy", ".tif": "tiff", ".tiff": "tiff", ".zarr": "zarr"}
_MOST_TIFF_TILE = 512  # viewers read whole tiles


def kind_of(path: Path) -> str:
    """npy, tiff or zarr. Raises ConfigError; InputError where zarr is not installed."""
    if path.suffix not in KINDS:
        raise ConfigError(
            f"output {path}: name it .npy, .tif, .ome.tif or .zarr; the name says the kind"
        )
    if path.suffix == ".zarr":
        _zarr()  # asked for first, before a journal lies there
    return KINDS[path.suffix]


@dataclass(frozen=True, kw_only=True)
class OutputSpec:
    """What is written: ``grid`` of each frame's (channels, *space), ``dtype``.

    keep_frames, keep_channels : whether the result has those axes, of however many
    """

    path: Path
    grid: TileGrid
    frames: int
    channels: int
    dtype: str
    keep_frames: bool
    keep_channels: bool

    def __post_init__(self) -> None:
        if kind_of(self.path) == "tiff":
            _ = self.tiff

    @property
    def kind(self) -> str:
        """npy, tiff or zarr."""
        return kind_of(self.path)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result as a reader sees it."""
        head = (self.frames,) * self.keep_frames + (self.channels,) * self.keep_channels
        return head + self.grid.shape

    @cached_property
    def header(self) -> bytes:
        """Of a .npy."""
        from raypipe.store.layout import npy_header

        return npy_header(self.dtype, self.shape)

    @cached_property
    def tiff(self) -> BigTiff:
        """The layout of a TIFF. Raises ConfigError for what TIFF cannot hold."""
        space = self.grid.shape
        return BigTiff(
            shape=(self.frames, self.channels, *((1,) * (3 - len(space))), *space),  # type: ignore[arg-type]
            dtype=np.dtype(self.dtype),
            tile=tiff_tile([axis.tile for axis in self.grid.axes[-2:]]),
            described=self.shape,
            ome=self.path.name.endswith((".ome.tif", ".ome.tiff")),
            name=self.path.name,
        )

    @property
    def nbytes(self) -> int:
        """Bytes that it takes; of Zarr the most, without its metadata: chunks of zeros are not stored."""
        if self.kind == "tiff":
            return self.tiff.nbytes
        itemsize = np.dtype(self.dtype).itemsize
        if self.kind == "zarr":  # those at the end are stored whole
            space = [round_up(axis.size, min(axis.tile, axis.size)) for axis in self.grid.axes]
            return self.frames * self.channels * math.prod(space) * itemsize
        return len(self.header) + math.prod(self.shape) * itemsize


def tiff_tile(tiles: list[int]) -> int:
    """The largest multiple of 16 up to 512 that divides all ``tiles``. Raises ConfigError."""
    common = math.gcd(*tiles)
    found = [n for n in range(16, _MOST_TIFF_TILE + 1, 16) if common % n == 0]
    if not found:
        raise ConfigError(
            f"tiles of {tiles} pixels do not fit TIFF, whose tiles are multiples of 16; take a "
            "chunk_size that is one, or another kind of output"
        )
    return found[-1]


class Output(Protocol):
    """An opened result. ``data`` is (channels, *box)."""

    def write(self, frame: int, box: Box, data: np.ndarray) -> None: ...

    def read(self, frame: int, box: Box) -> np.ndarray: ...

    def sync(self) -> None:
        """Make what was written durable."""
        ...

    def close(self) -> None: ...


def create(spec: OutputSpec, path: Path) -> None:
    """Make the whole of it at ``path``, unless it is there; NoSpace when it does not fit."""
    if spec.kind == "zarr":
        _create_zarr(spec, path)
        return
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        preallocate(fd, path, spec.nbytes)
        head = spec.tiff.header() if spec.kind == "tiff" else spec.header
        if os.pread(fd, len(head), 0) != head:
            pwrite_all(fd, head, 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    fsync_dir(path.parent)


def open_output(spec: OutputSpec, path: Path) -> Output:
    """For tiles, to be written and read back."""
    kinds: dict[str, Callable[[OutputSpec, Path], Output]]
    kinds = {"npy": _Npy, "tiff": _Tiff, "zarr": _Zarr}
    return kinds[spec.kind](spec, path)


class _Npy:
    """Runs of the last axis, each a pwrite."""

    def __init__(self, spec: OutputSpec, path: Path) -> None:
        self._spec, self._fd = spec, os.open(path, os.O_RDWR)
        self._dtype = np.dtype(spec.dtype)
        full = (spec.frames, spec.channels, *spec.grid.shape)
        steps = [math.prod(full[k + 1 :]) for k in range(len(full))]
        self._steps = [n * self._dtype.itemsize for n in steps]

    def _runs(self, frame: int, box: Box) -> Any:
        """(index into (channels, *box) of a run, offset)."""
        base = len(self._spec.header) + frame * self._steps[0] + box[-1].start * self._steps[-1]
        spans = [range(self._spec.channels), *(range(s.start, s.stop) for s in box[:-1])]
        for index in product(*map(range, map(len, spans))):
            at = (span[k] * n for span, k, n in zip(spans, index, self._steps[1:-1], strict=True))
            yield index, base + sum(at)

    def write(self, frame: int, box: Box, data: np.ndarray) -> None:
        data = np.ascontiguousarray(data, self._dtype)
        for index, offset in self._runs(frame, box):
            pwrite_all(self._fd, data[index].view(np.uint8).data, offset)

    def read(self, frame: int, box: Box) -> np.ndarray:
        shape = (self._spec.channels, *(s.stop - s.start for s in box))
        data, n_bytes = np.empty(shape, self._dtype), shape[-1] * self._dtype.itemsize
        for index, offset in self._runs(frame, box):
            data[index] = np.frombuffer(os.pread(self._fd, n_bytes, offset), self._dtype)
        return data

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class _Tiff:
    """Whole TIFF tiles, each a pwrite; a box begins on a TIFF tile and ends on one or at the image's end."""

    def __init__(self, spec: OutputSpec, path: Path) -> None:
        self._tiff, self._fd = spec.tiff, os.open(path, os.O_RDWR)

    def _tiles(self, frame: int, box: Box) -> Any:
        """(index of a plane in (channels, planes), offset, rows and cols within the box)."""
        _, channels, planes, _, _ = self._tiff.shape
        depth = range(box[0].start, box[0].stop) if len(box) == 3 else range(1)
        n = self._tiff.tile
        (top, bottom), (left, right) = ((s.start, s.stop) for s in box[-2:])
        for channel, (z, plane) in product(range(channels), enumerate(depth)):
            page = (frame * channels + channel) * planes + plane
            for row, col in product(range(top, bottom, n), range(left, right, n)):
                rows = slice(row - top, min(row + n, bottom) - top)
                cols = slice(col - left, min(col + n, right) - left)
                yield (channel, z), self._tiff.offset(page, row // n, col // n), rows, cols

    def write(self, frame: int, box: Box, data: np.ndarray) -> None:
        data = data if data.ndim == 4 else data[:, None]
        for plane, offset, rows, cols in self._tiles(frame, box):
            tile = np.zeros((self._tiff.tile,) * 2, self._tiff.dtype)
            part = data[plane][rows, cols]
            tile[: part.shape[0], : part.shape[1]] = part
            pwrite_all(self._fd, tile.view(np.uint8).data, offset)

    def read(self, frame: int, box: Box) -> np.ndarray:
        _, channels, *_ = self._tiff.shape
        shape = tuple(s.stop - s.start for s in box)
        data = np.empty((channels, *((1,) * (3 - len(shape))), *shape), self._tiff.dtype)
        for plane, offset, rows, cols in self._tiles(frame, box):
            raw = os.pread(self._fd, self._tiff.tile_bytes, offset)
            tile = np.frombuffer(raw, self._tiff.dtype).reshape((self._tiff.tile,) * 2)
            data[plane][rows, cols] = tile[: rows.stop - rows.start, : cols.stop - cols.start]
        return data.reshape(channels, *shape)

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class _Zarr:
    """Chunks of one tile: each is a file, which Zarr replaces as a whole."""

    def __init__(self, spec: OutputSpec, path: Path) -> None:
        self._spec, self._path, self._array = spec, path, _zarr().open_array(str(path), mode="r+")
        self._touched: set[Path] = set()

    def _where(self, frame: int, box: Box) -> tuple[slice, ...]:
        head = (slice(frame, frame + 1),) * self._spec.keep_frames
        return head + (slice(None),) * self._spec.keep_channels + box

    def write(self, frame: int, box: Box, data: np.ndarray) -> None:
        where = self._where(frame, box)
        shape = tuple(
            len(range(*s.indices(n))) for s, n in zip(where, self._spec.shape, strict=True)
        )
        self._array[where] = data.reshape(shape)
        starts = [range(*s.indices(n)) for s, n in zip(where, self._spec.shape, strict=True)]
        cells = [
            sorted({k // c for k in (r[0], r[-1])})
            for r, c in zip(starts, self._array.chunks, strict=True)
        ]
        self._touched |= {self._path.joinpath("c", *map(str, cell)) for cell in product(*cells)}

    def read(self, frame: int, box: Box) -> np.ndarray:
        part = np.asarray(self._array[self._where(frame, box)])
        return part.reshape(self._spec.channels, *(s.stop - s.start for s in box))

    def sync(self) -> None:
        """Zarr does not: each chunk's file, and the folders that name them."""
        for path in self._touched:
            if path.exists():  # a chunk of zeros only is not stored
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)
        for folder in {
            p for path in self._touched for p in path.parents if self._path in p.parents
        }:
            if folder.is_dir():
                fsync_dir(folder)
        self._touched.clear()

    def close(self) -> None:
        """Nothing is held open."""


def _zarr() -> Any:
    try:
        import zarr
    except ImportError:
        raise InputError(
            "a .zarr output needs the zarr package: pip install 'raypipe[export]'"
        ) from None
    return zarr


def _create_zarr(spec: OutputSpec, path: Path) -> None:
    zarr = _zarr()
    if (path / "zarr.json").is_file():
        return
    tile = tuple(min(axis.tile, axis.size) for axis in spec.grid.axes)
    chunks = (1,) * spec.keep_frames + (spec.channels,) * spec.keep_channels + tile
    names = ["t"] * spec.keep_frames + ["c"] * spec.keep_channels + list("zyx")[-len(tile) :]
    zarr.create_array(
        store=str(path),
        shape=spec.shape,
        chunks=chunks,
        dtype=spec.dtype,
        compressors=None,
        dimension_names=names,
        fill_value=0,
    )
    fsync_dir(path)
