"""What is tiled: images (channels, *space) behind a frame index, of which only windows are read.

Made of a path, an ``ImageSource`` (``raypipe.read.source2d``) or anything with shape, dtype and slicing
(NumPy, memory maps, Zarr, h5py). Cheap to pickle where what it stands for is a file: a whole memory map
travels as its path and is mapped again where it lands. Beyond the image's end it is reflected.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from raypipe.errors import ConfigError, InputError, MissingInput
from raypipe.read.sample import file_state
from raypipe.tile.files import files_of
from raypipe.tile.grid import Box, reading

_SAMPLES = 5  # an axis; their content stands for the image's in the fingerprint
_SAMPLE_PIXELS = 16


class Source(Protocol):
    """frames : images of one size; space : (rows, cols) or (planes, rows, cols)."""

    @property
    def frames(self) -> int: ...

    @property
    def channels(self) -> int: ...

    @property
    def space(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def read(self, frame: int, box: Box) -> np.ndarray:
        """(channels, *box) of one frame."""
        ...


@dataclass(frozen=True)
class ArraySource:
    """An array whose axes are named: F frames, C channels, Z Y X space; those not there have size 1."""

    array: Any
    axes: str

    def __post_init__(self) -> None:
        axes, shape = self.axes.upper(), tuple(self.array.shape)
        object.__setattr__(self, "axes", axes)
        if len(set(axes)) != len(axes) or not set("YX") <= set(axes) <= set("FCZYX"):
            raise ConfigError(
                f"axes {axes!r}: name each once, of F C Z Y X, with Y and X among them"
            )
        if len(axes) != len(shape) or min(shape, default=0) < 1:
            raise ConfigError(
                f"axes {axes!r} do not fit an array of shape {shape}: one letter a dimension, and none "
                "of them empty"
            )
        _check_numbers(np.dtype(self.array.dtype))

    def _size(self, axis: str) -> int:
        return int(self.array.shape[self.axes.index(axis)]) if axis in self.axes else 1

    @property
    def frames(self) -> int:
        """Size of F."""
        return self._size("F")

    @property
    def channels(self) -> int:
        """Size of C."""
        return self._size("C")

    @property
    def space(self) -> tuple[int, ...]:
        """(Z, Y, X) where there is a Z, else (Y, X)."""
        return tuple(self._size(axis) for axis in "ZYX" if axis in self.axes)

    @property
    def dtype(self) -> np.dtype[Any]:
        """As stored."""
        return np.dtype(self.array.dtype)

    def read(self, frame: int, box: Box) -> np.ndarray:
        """One window; only what the array's own slicing reads is read."""
        names = [axis for axis in "ZYX" if axis in self.axes]
        where = dict(zip(names, box, strict=True)) | {"F": slice(frame, frame + 1)}
        part = np.asarray(self.array[tuple(where.get(axis, slice(None)) for axis in self.axes)])
        order = [axis for axis in ("F", "C", *names) if axis in self.axes]
        part = part.transpose([self.axes.index(axis) for axis in order])
        if "F" in self.axes:
            part = part[0]
        return part if "C" in self.axes else part[None]

    def __getstate__(self) -> tuple[Any, str]:
        return _handle(self.array), self.axes

    def __setstate__(self, state: tuple[Any, str]) -> None:
        array = state[0].open() if isinstance(state[0], _Map) else state[0]
        object.__setattr__(self, "array", array)
        object.__setattr__(self, "axes", state[1])


@dataclass(frozen=True)
class _Map:
    """A whole memory map, by its file."""

    path: str
    dtype: Any
    offset: int
    shape: tuple[int, ...]
    order: str

    def open(self) -> np.ndarray:
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape, self.order)  # type: ignore[call-overload]


def _handle(array: Any) -> Any:
    """``array``, or what it is mapped from: a view of a map keeps the whole map's offset, so only a
    map that is no view is known by its file.
    """
    whole = isinstance(array, np.memmap) and not isinstance(array.base, np.ndarray)
    if not whole or array.filename is None:
        return array
    order = "C" if array.flags.c_contiguous else "F"
    return _Map(str(Path(array.filename).absolute()), array.dtype, array.offset, array.shape, order)


@dataclass(frozen=True)
class StackSource:
    """An ``ImageSource``; as one volume of planes when ``volume``."""

    stack: Any
    volume: bool = False

    @property
    def frames(self) -> int:
        """Images, or 1 volume."""
        return 1 if self.volume else int(self.stack.shape[0])

    @property
    def channels(self) -> int:
        """The last of four axes."""
        return int(self.stack.shape[3]) if len(self.stack.shape) == 4 else 1

    @property
    def space(self) -> tuple[int, ...]:
        """(rows, cols), of a volume (planes, rows, cols)."""
        shape = tuple(int(n) for n in self.stack.shape[:3])
        return shape if self.volume else shape[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the pixels."""
        return np.dtype(self.stack.dtype)

    def read(self, frame: int, box: Box) -> np.ndarray:
        """One window of one image, or of every plane in it."""
        if not self.volume:
            return _channels_first(self.stack.read(frame, *box))
        planes = [_channels_first(self.stack.read(z, *box[1:])) for z in _range(box[0])]
        return np.stack(planes, 1)


def _check_numbers(dtype: np.dtype[Any]) -> None:
    """Raises InputError: a model would be given the real part of a complex image without a word."""
    if dtype.kind not in "fiub":
        raise InputError(f"dtype {dtype} is no real number; convert the image first")


def _range(span: slice) -> range:
    return range(span.start, span.stop)


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def open_source(given: Any, dims: int, axes: str | None = None) -> Source:
    """``given`` as something to tile with a model of ``dims``. Raises MissingInput, InputError,
    ConfigError for an array whose axes cannot be known.
    """
    if isinstance(given, (str, os.PathLike)):
        given = open_path(Path(given))
    if hasattr(given, "series_shape"):
        given = _of_tiff(given, dims, axes)
    if callable(getattr(given, "read", None)) and len(given.shape) in (3, 4) and axes is None:
        _check_numbers(np.dtype(given.dtype))
        return StackSource(given, volume=dims == 3)
    if callable(getattr(given, "read", None)) and axes is not None:
        raise ConfigError(
            f"axes {axes!r} are of arrays and TIFF; leave them out for a {type(given).__name__}"
        )
    if not all(hasattr(given, name) for name in ("shape", "dtype", "__getitem__")):
        raise InputError(
            f"input is a {type(given).__name__}: give a path, or an array (shape, dtype, slicing)"
        )
    return ArraySource(given, axes or _usual_axes(tuple(given.shape), dims))


def _of_tiff(stack: Any, dims: int, axes: str | None) -> Any:
    """``stack`` itself, or as an array of all its axes when these are named. Raises ConfigError for a
    volume that it may be one of several of.
    """
    if axes is not None:
        from raypipe.read.tiff.lazy import LazyStack

        return LazyStack(stack)
    page_axes = len(stack.shape) - 1
    lead = stack.series_shape[:-page_axes]
    if dims == 3 and sum(n > 1 for n in lead) > 1:
        raise ConfigError(
            f"a TIFF of axes {stack.axes} and shape {tuple(stack.series_shape)} is not one volume; name "
            "them, e.g. axes='FZCYX' (F for time)"
        )
    return stack


def _usual_axes(shape: Sequence[int], dims: int) -> str:
    """Raises ConfigError where more than one reading is likely."""
    found = {(2, 2): "YX", (2, 3): "FYX", (3, 3): "ZYX", (3, 4): "FZYX"}.get((dims, len(shape)))
    if found is None or (found == "FYX" and min(shape[0], shape[-1]) <= 4 and shape[0] > 1):
        raise ConfigError(
            f"an array of shape {tuple(shape)} can be read in several ways; name its axes, e.g. "
            "axes='YXC' (channels last), 'CYX' (channels first), 'FYX' (frames)"
        )
    return found


def open_path(path: Path) -> Any:
    """What lies at ``path``: a TIFF stack, a picture or an array. Raises MissingInput, InputError."""
    if not path.exists():
        raise MissingInput(f"input {path} does not exist; give a file, or an array")
    if path.suffix == ".npy":
        from raypipe.read.arrays import open_array

        return open_array(path)
    if path.suffix == ".zarr":
        return _open_zarr(path)
    if path.is_dir():
        raise InputError(
            f"input {path} is a folder; give one of its files, or for a stack in TIFF files "
            "raypipe.load_tiff_stack(folder)"
        )
    from raypipe.read.source2d import open_image

    return open_image(path)


def _open_zarr(path: Path) -> Any:
    try:
        import zarr
    except ImportError:
        raise InputError(
            f"input {path} needs the zarr package: pip install 'raypipe[export]'"
        ) from None
    found = zarr.open(str(path), mode="r")
    if not hasattr(found, "dtype"):
        raise InputError(f"{path} is a Zarr group; give the path of one of its arrays")
    return found


def describe(source: Source) -> str:
    """``2 image(s) of 301x277, 1 channel(s), uint8; TIFF of axes IYX (2, 301, 277), 2 page(s) in …``."""
    given: Any = getattr(source, "array", getattr(source, "stack", None))
    size = "x".join(map(str, source.space))
    text = f"{source.frames} image(s) of {size}, {source.channels} channel(s), {source.dtype.name}"
    named = f"axes {source.axes}" if isinstance(source, ArraySource) else ""
    stack: Any = getattr(given, "source", given)
    if hasattr(stack, "series_shape"):
        pages = sum(len(part.at) for part in stack.parts)
        named = (
            f"TIFF of axes {getattr(source, 'axes', stack.axes)} {tuple(stack.series_shape)}, {pages} page(s)"
            f" in {len(stack.parts)} file(s), read by {' and '.join(sorted(set(stack.way)))}"
        )
    return f"{text}; {named}" if named else text


def read_window(source: Source, frame: int, box: Box) -> np.ndarray:
    """(channels, *box) of the frame's reflected continuation; see ``grid``."""
    spans, orders = zip(
        *(reading(s, n) for s, n in zip(box, source.space, strict=True)), strict=True
    )
    pixels = source.read(frame, spans)
    for axis, order in enumerate(orders, start=1):
        if order is not None:
            pixels = pixels.take(order, axis)
    return pixels


def digest(source: Source) -> str:
    """Hash of shape and dtype; of files their sizes and times of change, of an array in memory all
    bytes; and of sampled pixels: small windows spread over the first, the middle and the last frame.
    """
    head = (source.frames, source.channels, source.space, source.dtype.str)
    files = files_of(source)
    hasher = xxhash.xxh3_128(repr((head, [_states(path) for path in files])).encode())
    array = getattr(source, "array", None)
    if isinstance(array, np.ndarray) and not files:
        for part in array if array.ndim > 2 else [array]:  # a copy of a plane at most
            hasher.update(np.ascontiguousarray(part).view(np.uint8).data)
        return hasher.hexdigest()
    for frame in sorted({0, source.frames // 2, source.frames - 1}):
        for number in range(_SAMPLES ** len(source.space)):
            place = np.unravel_index(number, (_SAMPLES,) * len(source.space))
            box = tuple(_sample(n, int(k)) for n, k in zip(source.space, place, strict=True))
            hasher.update(source.read(frame, box).tobytes())
    return hasher.hexdigest()


def _states(path: Path) -> list[tuple[str, int, int]]:
    """Name and state of a file, or of all in a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return [(file.name, *file_state(file)) for file in files]


def _sample(size: int, k: int) -> slice:
    lo = max(0, size - _SAMPLE_PIXELS) * k // (_SAMPLES - 1)
    return slice(lo, min(size, lo + _SAMPLE_PIXELS))
