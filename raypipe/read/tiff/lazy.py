"""A TIFF stack that is sliced like an array and read only by what is asked of it.

``np.asarray`` reads all of it, as it says; nothing else does. A slice with a step is read in bands
of rows, so that a thumbnail of a large image costs a band and not the image.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from raypipe.read.tiff.keys import ranges_of
from raypipe.read.tiff.stack import TiffStack

_BAND_BYTES = 8 << 20


class LazyStack:
    """What ``tifffile.imread`` would give, on the disk: shape, dtype, len, slicing, iteration.

    source : the frames behind it. Picklable; the same in every thread.
    """

    def __init__(self, source: TiffStack) -> None:
        self.source = source
        self.shape = source.series_shape
        self.dtype = source.dtype
        self._frame_ndim = len(source.shape) - 1

    @property
    def ndim(self) -> int:
        """Axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that ``np.asarray`` would take."""
        return self.size * self.dtype.itemsize

    @property
    def axes(self) -> str:
        """A letter for each axis."""
        return self.source.axes

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[k] for k in range(len(self)))

    def __repr__(self) -> str:
        return f"LazyStack({self.source}, shape {self.shape} {self.axes})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a stack on the disk cannot become an array without a copy")
        return self[...].astype(self.dtype if dtype is None else dtype, copy=False)

    def __getitem__(self, key: Any) -> np.ndarray:
        """What NumPy would give for integers, slices and ``...``, as an array of its own."""
        ranges, taken = ranges_of(key, self.shape)
        out = np.empty([len(each) for each in ranges], self.dtype)
        if out.size:
            self._read(ranges, out)
        return out.reshape([n for axis, n in enumerate(out.shape) if axis not in taken])[()]

    def _read(self, ranges: list[range], out: np.ndarray) -> None:
        lead, inner = ranges[: -self._frame_ndim], ranges[-self._frame_ndim :]
        sizes = self.shape[: len(lead)]
        steps = [math.prod(sizes[axis + 1 :]) for axis in range(len(lead))]
        slots = out.reshape(-1, *[len(each) for each in inner])
        for slot, index in zip(slots, itertools.product(*lead), strict=True):
            frame = sum(at * step for at, step in zip(index, steps, strict=True))
            self._read_frame(frame, inner, slot)

    def _read_frame(self, frame: int, inner: list[range], out: np.ndarray) -> None:
        """Rows, columns and channels of ``frame`` into ``out``."""
        rows, cols, *channels = inner
        every = all(
            each == range(size) for each, size in zip(channels, self.shape[-1:], strict=False)
        )
        if every and rows.step == 1 and cols.step == 1:
            self.source.read_into(frame, out, _bounds(rows), _bounds(cols))
            return
        row_bytes = math.prod(self.source.shape[2:]) * self.dtype.itemsize
        band = max(1, _BAND_BYTES // (row_bytes * abs(rows.step)))
        for k in range(0, len(rows), band):
            some = rows[k : k + band]
            crop = self.source.read(frame, _bounds(some), _bounds(cols))
            # What was read begins and ends with the first and last of each axis.
            steps = [slice(None, None, some.step), slice(None, None, cols.step)]
            out[k : k + band] = crop[(*steps, *map(_as_slice, channels))]


def _bounds(each: range) -> slice:
    """From the lowest to the highest of ``each``."""
    ends = each[0], each[-1]
    return slice(min(ends), max(ends) + 1)


def _as_slice(each: range) -> slice:
    """``each`` as a slice of its whole axis."""
    return slice(each.start, None if each.stop < 0 else each.stop, each.step)
