"""Which pixels of a large image are read, kept and written for each of its tiles. Pure.

The image is thought of as padded at its far ends, by reflection, to a multiple of ``align``: the
whole-image result that tiles must equal is that of the padded image, cut back. Every window has one
shape: near an end it is moved inwards, not cut, so that it ends either at the padded image's own
border, where the model sees the same border as in the whole image, or at least a halo away from what
is kept. How large halo and align must be is measured in ``field``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from raypipe.errors import ConfigError

Box = tuple[slice, ...]


def round_up(value: int, unit: int) -> int:
    """The smallest multiple of ``unit`` that is not below ``value``."""
    return -(-value // unit) * unit


@dataclass(frozen=True, kw_only=True)
class AxisGrid:
    """One axis: ``size`` pixels in tiles of ``tile``. Raises ConfigError.

    halo : pixels that the model looks beyond what is kept, rounded up to ``align``
    align : windows begin and end at multiples of it, and ``tile`` is one
    """

    size: int
    tile: int
    halo: int = 0
    align: int = 1

    def __post_init__(self) -> None:
        if self.size < 1 or self.align < 1 or self.halo < 0:
            raise ConfigError(
                f"size {self.size}, align {self.align}, halo {self.halo}: an image has 1 pixel or "
                "more, align is at least 1, halo at least 0"
            )
        if self.tile < 1 or self.tile % self.align:
            good = max(round_up(self.tile, self.align), self.align)
            raise ConfigError(
                f"tile {self.tile} is no multiple of {self.align}, the model's alignment; take {good}"
            )
        object.__setattr__(self, "halo", round_up(self.halo, self.align))

    @property
    def padded(self) -> int:
        """Pixels of the padded axis."""
        return round_up(self.size, self.align)

    @property
    def window(self) -> int:
        """Pixels of every window."""
        return min(self.padded, self.tile + 2 * self.halo)

    def __len__(self) -> int:
        return -(-self.size // self.tile)

    def keep(self, k: int) -> slice:
        """Pixels of the image that tile ``k`` gives."""
        return slice(k * self.tile, min((k + 1) * self.tile, self.size))

    def read(self, k: int) -> slice:
        """Pixels of the padded axis that the model is shown for tile ``k``."""
        lo = min(max(k * self.tile - self.halo, 0), self.padded - self.window)
        return slice(lo, lo + self.window)


@dataclass(frozen=True)
class Tile:
    """One tile. keep : in the image; read : in the padded image; inner : ``keep`` within ``read``."""

    number: int
    place: tuple[int, ...]
    keep: Box
    read: Box

    @property
    def inner(self) -> Box:
        """Where what is kept lies in the window."""
        pairs = zip(self.keep, self.read, strict=True)
        return tuple(slice(k.start - r.start, k.stop - r.start) for k, r in pairs)


@dataclass(frozen=True)
class TileGrid:
    """The tiles of an image, (rows, cols) or (planes, rows, cols), numbered in C order."""

    axes: tuple[AxisGrid, ...]

    @classmethod
    def of(
        cls, shape: Sequence[int], tile: Sequence[int], halo: Sequence[int], align: Sequence[int]
    ) -> TileGrid:
        """The grid of an image of ``shape``; all in pixels, one number an axis."""
        rows = zip(shape, tile, halo, align, strict=True)
        return cls(tuple(AxisGrid(size=s, tile=t, halo=h, align=a) for s, t, h, a in rows))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the image."""
        return tuple(axis.size for axis in self.axes)

    @property
    def window(self) -> tuple[int, ...]:
        """Shape of every window."""
        return tuple(axis.window for axis in self.axes)

    @property
    def counts(self) -> tuple[int, ...]:
        """Tiles along each axis."""
        return tuple(map(len, self.axes))

    def __len__(self) -> int:
        return math.prod(self.counts)

    def tile(self, number: int) -> Tile:
        """Tile ``number``."""
        place = tuple(int(k) for k in np.unravel_index(number, self.counts))
        return self.at(place)

    def at(self, place: tuple[int, ...]) -> Tile:
        """The tile at ``place``, one index an axis."""
        pairs = list(zip(self.axes, place, strict=True))
        keep, read = tuple(a.keep(k) for a, k in pairs), tuple(a.read(k) for a, k in pairs)
        return Tile(int(np.ravel_multi_index(place, self.counts)), place, keep, read)

    def __iter__(self) -> Iterator[Tile]:
        return (self.tile(number) for number in range(len(self)))


def reflected(span: slice, size: int) -> np.ndarray:
    """Pixels of an axis of ``size`` that stand at ``span`` of its reflected continuation, which does
    not repeat the end pixel (``np.pad(mode="reflect")``); an axis of one pixel repeats that one.
    """
    at = np.arange(span.start, span.stop)
    if size == 1:
        return np.zeros_like(at)
    period = 2 * size - 2
    at = at % period
    return np.where(at < size, at, period - at)


def reading(span: slice, size: int) -> tuple[slice, np.ndarray | None]:
    """What to read of an axis for ``span`` of the padded one: pixels, and which of those to take in
    what order (None: as they are).
    """
    if span.stop <= size:
        return span, None
    at = reflected(span, size)
    lo, hi = int(at.min()), int(at.max()) + 1
    return slice(lo, hi), at - lo
