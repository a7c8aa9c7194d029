"""Where an image's channels are: in its pixels (YXC), or on pages of their own (CYX).

Microscopes and ImageJ write a page a channel, and say so in the file: an axis C before Y and X. What a
file does not say ``axes`` names, a letter a dimension; also that its channels are pictures (FYX), but
nothing else that it contradicts. One rule for all: `open_pixels` gives fit and evaluate every picture with
its channels last, `open_tiles` gives predict the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raypipe.errors import ConfigError, InputError
from raypipe.read.source2d import ImageSource, open_image
from raypipe.read.tiff import LazyStack, TiffStack
from raypipe.read.tiff.span import span

if TYPE_CHECKING:
    from raypipe.tile.source import Source

LETTERS = "FCYX"
# S: the samples of a pixel, which a planar RGB file keeps on pages too.
_CHANNELS = "CS"
# What a file's letter may be called; a file with others (I, Q) does not say what its dimensions are.
_MAY_BE = {"T": "FZ", "Z": "FZ", "C": "CF", "S": "CF", "Y": "Y", "X": "X"}


def check_axes(axes: str) -> str:
    """``axes`` in capitals. Raises ConfigError."""
    found = axes.upper()
    if len(set(found)) != len(found) or not set("YX") <= set(found) <= set(LETTERS):
        raise ConfigError(
            f"axes {axes!r}: name each dimension once, of F (frames) C Y X, with Y and X among them"
        )
    return found


def open_pixels(path: Path, axes: str | None = None) -> ImageSource:
    """The pictures of ``path``, (n, height, width) or (n, height, width, channels).

    Raises MissingInput, InputError (channels in two places), ConfigError (axes that do not fit, or are
    others than the file says).
    """
    # Of an OME-TIFF set each file's own pages: all of them in every file would stand on two sides.
    source = open_image(path, alone=False)
    if axes is not None:
        return _named(source, axes, path)
    return _as_it_says(source) if isinstance(source, TiffStack) else source


def open_tiles(path: Path, axes: str | None = None) -> Source:
    """The same pictures to be cut into tiles; ``path`` may be .npy or .zarr too, and an OME-TIFF brings its
    whole set. Raises as `open_pixels`.
    """
    from raypipe.tile.source import open_path, open_source

    given = open_path(path)
    if axes is None:
        return open_source(_as_it_says(given) if isinstance(given, TiffStack) else given, 2)
    source = open_source(given, 2, axes)
    if isinstance(given, TiffStack):
        check_agrees(given, axes.upper())
    return source


def axes_taken(source: Source) -> str:
    """A letter a dimension of what ``source`` (`open_tiles`) reads, of F C Y X (and Z)."""
    from raypipe.tile.source import ArraySource

    if isinstance(source, ArraySource):
        return source.axes
    stack: Any = getattr(source, "stack", source)
    at: int | None = None
    if isinstance(stack, PagedChannels):
        stack, at = stack.source, stack.at
    if not isinstance(stack, TiffStack):
        return "YXC"[: len(stack.shape) - 1]
    lead = "".join("C" if place == at else "F" for place in range(_n_lead(stack)))
    return lead + ("YX" if at is not None else "YXC"[: len(stack.shape) - 1])


def check_agrees(stack: TiffStack, axes: str) -> None:
    """Raises ConfigError where ``axes`` contradict the file: sizes may fit all the same, and times would be
    taken for channels.
    """
    said = stack.axes
    long = [at for at, n in enumerate(stack.series_shape) if n > 1]
    own = [at for at in long if said[at] in _CHANNELS]
    wrong = bool(own) and "C" in axes and axes.index("C") not in own
    if names_all(stack):
        wrong = wrong or any(axes[at] not in _MAY_BE[said[at]] for at in long)
    if wrong:
        sizes = " x ".join(map(str, stack.series_shape))
        raise ConfigError(
            f"axes {axes!r} are not those of {stack.parts[0].path.name}, which says {said} ({sizes}); leave"
            " --axes out and the file is followed, or save it anew with the right ones"
        )


def names_all(source: ImageSource) -> bool:
    """Whether ``source`` is of a file that says what each of its dimensions is."""
    return isinstance(source, TiffStack) and set(source.axes) <= set(_MAY_BE)


def channel_pages(lead: tuple[int, ...], at: int) -> np.ndarray:
    """(pictures, channels): the page of each, where pages have the axes ``lead`` and the one at place
    ``at`` is that of channels; pictures in the order of the others.
    """
    pages = np.arange(math.prod(lead)).reshape(lead)
    return np.moveaxis(pages, at, -1).reshape(-1, lead[at])


@dataclass(frozen=True, eq=False)
class PagedChannels:
    """A TIFF whose channels are pages; `raypipe.read.source2d.ImageSource`. at : their place among axes."""

    source: TiffStack
    at: int

    @cached_property
    def pages(self) -> np.ndarray:
        """(pictures, channels), as `channel_pages`."""
        return channel_pages(self.source.series_shape[: _n_lead(self.source)], self.at)

    @property
    def shape(self) -> tuple[int, ...]:
        """(pictures, height, width, channels)."""
        return len(self.pages), *self.source.shape[1:3], self.pages.shape[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the pixels."""
        return self.source.dtype

    def read(self, frame: int, rows: slice = slice(None), cols: slice = slice(None)) -> np.ndarray:
        """Pixels (rows, cols, channels): a crop of each channel's page, which lie one after the other."""
        height, width = span(rows, self.shape[1]), span(cols, self.shape[2])
        planes = np.empty(
            (self.shape[3], height[1] - height[0], width[1] - width[0], *self.source.shape[3:]),
            self.dtype,
        )
        for plane, page in zip(planes, self.pages[frame], strict=True):
            self.source.read_into(int(page), plane, rows, cols)
        return np.moveaxis(planes.reshape(planes.shape[:3]), 0, -1)


@dataclass(frozen=True, eq=False)
class NamedAxes:
    """A TIFF by named axes, as tiles of it are read; `raypipe.read.source2d.ImageSource`.

    source : `raypipe.tile.source.ArraySource`
    """

    source: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """(pictures, height, width, channels)."""
        return self.source.frames, *self.source.space, self.source.channels

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the pixels."""
        return np.dtype(self.source.dtype)

    def read(self, frame: int, rows: slice = slice(None), cols: slice = slice(None)) -> np.ndarray:
        """Pixels (rows, cols, channels)."""
        return np.moveaxis(self.source.read(frame, (rows, cols)), 0, -1)


def _named(source: ImageSource, axes: str, path: Path) -> ImageSource:
    # Here: a process that only reads pages needs none of it.
    from raypipe.tile.source import ArraySource

    if not isinstance(source, TiffStack):
        raise ConfigError(
            f"axes {axes!r} are of TIFF files; leave them out for {path.name}, or save it as TIFF"
        )
    try:
        found = NamedAxes(ArraySource(LazyStack(source), check_axes(axes)))
    except InputError as error:
        raise ConfigError(f"{path.name}: {error}") from None
    check_agrees(source, check_axes(axes))
    return found


def _as_it_says(stack: TiffStack) -> ImageSource:
    letters = stack.axes[: _n_lead(stack)]
    places = [at for at, letter in enumerate(letters) if letter in _CHANNELS]
    if not places:
        return stack
    if len(places) > 1 or stack.shape[3:] > (1,):
        raise InputError(
            f"{stack.parts[0].path.name} has channels in two places (axes {stack.axes}, shape"
            f" {stack.series_shape}); say with --axes which are frames (F), e.g. FYXC"
        )
    return PagedChannels(stack, places[0])


def _n_lead(stack: TiffStack) -> int:
    """Axes before those of a page."""
    return len(stack.axes) - (len(stack.shape) - 1)
