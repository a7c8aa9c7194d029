"""Where an image's channels are: in its pixels (YXC), or on pages of their own (CYX).

Microscopes and ImageJ write a page a channel, and say so in the file: an axis C before Y and X. What a
file does not say, or says wrongly, ``axes`` names: a letter a dimension, as for ``segment predict
--axes``. `open_pixels` gives every picture with its channels last, whichever it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.errors import ConfigError, InputError
from raypipe.read.source2d import ImageSource, open_image
from raypipe.read.tiff import LazyStack, TiffStack

LETTERS = "FCYX"
# S: the samples of a pixel, which a planar RGB file keeps on pages too.
_CHANNELS = "CS"


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

    Raises MissingInput, InputError (channels in two places), ConfigError (axes that do not fit).
    """
    # Of an OME-TIFF set each file's own pages: all of them in every file would stand on two sides.
    source = open_image(path, alone=False)
    if axes is not None:
        return _named(source, axes, path)
    return _as_it_says(source, path) if isinstance(source, TiffStack) else source


def channel_pages(lead: tuple[int, ...], at: int) -> np.ndarray:
    """(pictures, channels): the page of each, where pages have the axes ``lead`` and the one at place
    ``at`` is that of channels; pictures in the order of the others.
    """
    pages = np.arange(math.prod(lead)).reshape(lead)
    return np.moveaxis(pages, at, -1).reshape(-1, lead[at])


@dataclass(frozen=True, eq=False)
class PagedChannels:
    """A TIFF whose channels are pages; `raypipe.read.source2d.ImageSource`. pages : `channel_pages`."""

    stack: TiffStack
    pages: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """(pictures, height, width, channels)."""
        return len(self.pages), *self.stack.shape[1:3], self.pages.shape[1]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the pixels."""
        return self.stack.dtype

    def read(self, frame: int, rows: slice = slice(None), cols: slice = slice(None)) -> np.ndarray:
        """Pixels (rows, cols, channels): a crop of each channel's page."""
        return np.dstack([self.stack.read(int(page), rows, cols) for page in self.pages[frame]])


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
        return NamedAxes(ArraySource(LazyStack(source), check_axes(axes)))
    except InputError as error:
        raise ConfigError(f"{path.name}: {error}") from None


def _as_it_says(stack: TiffStack, path: Path) -> ImageSource:
    n_lead = len(stack.axes) - (len(stack.shape) - 1)
    places = [at for at, letter in enumerate(stack.axes[:n_lead]) if letter in _CHANNELS]
    if not places:
        return stack
    if len(places) > 1 or stack.shape[3:] > (1,):
        raise InputError(
            f"{path.name} has channels in two places (axes {stack.axes}, shape"
            f" {stack.series_shape}); say with --axes which are frames (F), e.g. FYXC"
        )
    return PagedChannels(stack, channel_pages(stack.series_shape[:n_lead], places[0]))
