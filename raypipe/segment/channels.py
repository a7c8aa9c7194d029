"""Where an image's channels are: in its pixels (YXC), or on pages of their own (CYX).

Microscopes and ImageJ write a page a channel, and say so in the file: an axis C before Y and X. What a
file does not say, or says wrongly, ``axes`` names, a letter a dimension; FYX makes an image of each page,
whatever axes pages have. Only a file's C stays where it is: its channels are pictures when named F, and
no other axis is C beside them. One rule for all: `open_pixels` gives fit and evaluate every picture with
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
# What a file's letter may be called and nothing is worth a word; others (I, Q) are no file's word.
_MAY_BE = {"T": "FZ", "Z": "FZ", "C": "C", "S": "C", "Y": "Y", "X": "X"}


def check_axes(axes: str) -> str:
    """``axes`` in capitals. Raises ConfigError."""
    found = axes.upper()
    once = found.replace("F", "")
    if len(set(once)) != len(once) or not set("YX") <= set(found) <= set(LETTERS):
        raise ConfigError(
            f"axes {axes!r}: give a letter a dimension, of F (frames) C Y X, each but F once, with Y and X"
            " among them"
        )
    return found


def open_pixels(path: Path, axes: str | None = None) -> ImageSource:
    """The pictures of ``path``, (n, height, width) or (n, height, width, channels).

    Raises MissingInput, InputError (channels in two places), ConfigError (axes that do not fit). Whether
    axes agree with the file is `check_agrees`'s, where files are listed: a run goes on as it was fitted.
    """
    # Of an OME-TIFF set each file's own pages: all of them in every file would stand on two sides.
    source = open_image(path, alone=False)
    if axes is None or _are_of_picture(source, axes):
        return _as_it_says(source) if isinstance(source, TiffStack) else source
    if not isinstance(source, TiffStack):
        raise ConfigError(
            f"axes {axes!r} are of TIFF files; leave them out for {path.name}, or save it as TIFF"
        )
    return _as_named(source, check_axes(axes))


def open_tiles(path: Path, axes: str | None = None, channels: int | None = None) -> Source:
    """The same pictures to be cut into tiles; ``path`` may be .npy or .zarr too, and an OME-TIFF brings its
    whole set.

    channels : of the model: of a file that has others by what it says, and that many on each page, the
        pages are images. Raises as `open_pixels`, and ConfigError as `check_agrees`.
    """
    from raypipe.tile.source import open_path, open_source

    given = open_path(path)
    if not isinstance(given, TiffStack):
        return open_source(given, 2, None if axes and _are_of_picture(given, axes) else axes)
    if axes is None:
        return open_source(given if channels == page_channels(given) else _as_it_says(given), 2)
    found = _as_named(given, axes.upper())
    check_agrees(found)
    return found.source if isinstance(found, NamedAxes) else open_source(found, 2)


def axes_taken(source: Any) -> str:
    """A letter a dimension of what ``source`` (`open_tiles`, `open_pixels`) reads, of F C Y X (and Z); FYX
    and FYXC of pages that are images, whatever axes they have. As ``axes`` it means the same.
    """
    stack, letters = _letters(source)
    if stack is None or "C" in letters[:-1] or not letters.startswith("FF"):
        return letters
    return "F" + letters.lstrip("F")


def check_agrees(source: Any) -> None:
    """Raises ConfigError where the file of ``source`` has its channels elsewhere: sizes may fit all the same,
    and times would be taken for channels. Other letters may be wrong in a file, and who names them knows.
    """
    stack, axes = _letters(source)
    if stack is None:
        return
    own = _own(stack)
    moved = "C" in axes and axes.index("C") not in own
    if own and (moved or any(axes[at] not in "CF" for at in own)):
        sizes = " x ".join(map(str, stack.series_shape))
        raise ConfigError(
            f"axes {axes!r} are not those of {stack.parts[0].path.name}, which says {stack.axes} ({sizes});"
            " leave --axes out and the file is followed, or save it anew with the right ones"
        )


def said_otherwise(source: Any, why: str) -> str:
    """``the file says ZYX, taken as CYX as asked`` where the file of ``source`` says other axes than are
    taken; else "". why : the last words.
    """
    stack, axes = _letters(source)
    if stack is None:
        return ""
    long = [at for at, n in enumerate(stack.series_shape) if n > 1]
    if all(axes[at] in _MAY_BE.get(stack.axes[at], "FCZYX") for at in long):
        return ""
    return f"the file says {stack.axes}, taken as {axes_taken(source)} {why}"


def ways(source: Any, channels: int) -> list[str]:
    """Axes that `check_agrees` accepts and by which a TIFF has so many ``channels``; none of others."""
    stack, _ = _letters(source)
    if stack is None:
        return []
    found = ["FYX" if len(stack.shape) < 4 else "FYXC"] if page_channels(stack) == channels else []
    places = _own(stack) or range(_n_lead(stack))
    if stack.shape[3:] in ((), (1,)) and channels > 1:
        fit = [at for at in places if at < _n_lead(stack) and stack.series_shape[at] == channels]
        found += [_lead(stack, at) + "YX" for at in fit]
    return found


def page_channels(stack: TiffStack) -> int:
    """Of each page by itself."""
    return stack.shape[3] if len(stack.shape) > 3 else 1


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


def _as_named(stack: TiffStack, axes: str) -> ImageSource:
    """``stack`` by ``axes``. Raises ConfigError where they do not fit."""
    # Here: a process that only reads pages needs none of it.
    from raypipe.tile.source import ArraySource

    n_lead, plane = _n_lead(stack), "YXC"[: len(stack.shape) - 1]
    for page in {plane, "YX"} if stack.shape[3:] == (1,) else {plane}:
        lead = axes.removesuffix(page)
        if lead + page != axes:
            continue
        if lead in ("F", "F" * n_lead) and (n_lead != 1 or page != plane) and lead:
            return stack
        several = n_lead > 2 or page != plane  # else each letter is a dimension's
        if several and page == "YX" and sorted(lead) == ["C", *"F" * (n_lead - 1)]:
            return PagedChannels(stack, lead.index("C"))
    try:
        return NamedAxes(ArraySource(LazyStack(stack), axes))
    except InputError as error:
        hint = f"; F{plane} takes each page for an image" if isinstance(error, ConfigError) else ""
        raise ConfigError(f"{stack.parts[0].path.name}: {error}{hint}") from None


def _are_of_picture(source: Any, axes: str) -> bool:
    """Whether ``axes`` are what a PNG or the like has anyway."""
    picture = not isinstance(source, TiffStack) and callable(getattr(source, "read", None))
    return picture and axes.upper() == "YXC"[: len(source.shape) - 1]


def _letters(source: Any) -> tuple[TiffStack | None, str]:
    """The TIFF behind ``source``, if it is one, and the letter taken for each of its dimensions."""
    from raypipe.tile.source import ArraySource

    source = source.source if isinstance(source, NamedAxes) else getattr(source, "stack", source)
    if isinstance(source, ArraySource):
        stack = getattr(source.array, "source", None)
        return stack if isinstance(stack, TiffStack) else None, source.axes
    if isinstance(source, PagedChannels):
        return source.source, _lead(source.source, source.at) + "YX"
    lead = _lead(source) if isinstance(source, TiffStack) else ""
    stack = source if isinstance(source, TiffStack) else None
    return stack, lead + "YXC"[: len(source.shape) - 1]


def _lead(stack: TiffStack, at: int | None = None) -> str:
    """Letters of the axes before a page's, C at ``at``."""
    return "".join("C" if place == at else "F" for place in range(_n_lead(stack)))


def _own(stack: TiffStack) -> list[int]:
    """Places of what the file calls channels."""
    pairs = zip(stack.axes, stack.series_shape, strict=True)
    return [at for at, (letter, n) in enumerate(pairs) if letter in _CHANNELS and n > 1]


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
