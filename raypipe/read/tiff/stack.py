"""Frames of one or many TIFF files behind one global index: a handle that opens no file by itself.

All leading axes (time, depth, channels, pages, files) are one index here, in the order in which
``tifffile.imread`` would lay them out; ``lazy`` gives them back their axes. A process that reads
keeps each file open once (``opened``), however many copies of the handle it was sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from raypipe.errors import ConfigError, InputError
from raypipe.read.tiff.opened import opened
from raypipe.read.tiff.part import Part
from raypipe.read.tiff.places import MISSING
from raypipe.read.tiff.span import span


@dataclass(frozen=True, kw_only=True, eq=False)
class TiffStack:
    """A TIFF stack; `raypipe.read.source2d.ImageSource`.

    shape        : (n_frames, height, width) or (n_frames, height, width, channels)
    dtype        : in this machine's byte order, whatever the file's
    series_shape : with all axes, as ``tifffile.imread`` gives it; of several files: as ``shape``
    axes         : a letter each of series_shape: T Z C Y X S, I for pages or files without a name
    order        : (n_pages,) the place of each page among those of all parts, -1 for one that is
        missing; None: one after the other
    """

    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    series_shape: tuple[int, ...]
    axes: str
    order: np.ndarray | None = None

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def way(self) -> tuple[str, ...]:
        """How each file is read: "map" (plain values) or "pages" (decoded)."""
        return tuple(part.way for part in self.parts)

    @property
    def why(self) -> tuple[str, ...]:
        """The same in words, with what was left out or is missing."""
        return tuple(f"{part.path.name}: {part.why}" for part in self.parts)

    def read(self, frame: int, rows: slice = slice(None), cols: slice = slice(None)) -> np.ndarray:
        """Pixels (rows, cols[, channels]) of a frame; only what they touch is read and decoded.

        Raises ConfigError for what the stack does not have, InputError for a file that is damaged
        or was changed, MissingInput.
        """
        height, width = span(rows, self.shape[1]), span(cols, self.shape[2])
        out = np.empty((height[1] - height[0], width[1] - width[0], *self.shape[3:]), self.dtype)
        self.read_into(frame, out, rows, cols)
        return out

    def read_into(
        self, frame: int, out: np.ndarray, rows: slice = slice(None), cols: slice = slice(None)
    ) -> None:
        """`read` into ``out``, of the crop's shape and this dtype, C-contiguous."""
        height, width = span(rows, self.shape[1]), span(cols, self.shape[2])
        part, page, plane = self._find(frame)
        shape = (height[1] - height[0], width[1] - width[0], *self.shape[3:])
        if out.shape != shape or out.dtype != self.dtype or not out.flags.c_contiguous:
            raise ConfigError(
                f"pixels {shape} {self.dtype.name} asked into {out.shape} {out.dtype.name}; give a "
                "C-contiguous array of the same shape and dtype"
            )
        if out.size == 0:
            return
        out = out.reshape(*out.shape[:2], part.page.samples)
        if part.way == "map":
            opened(part).copy_plane(page, plane, height, width, out)
        else:
            opened(part).decode_plane(page, plane, height, width, out)

    def frames(self, lo: int, hi: int) -> np.ndarray:
        """Frames [lo, hi): (hi - lo, height, width[, channels])."""
        if not 0 <= lo <= hi <= len(self):
            raise ConfigError(f"frames {lo} to {hi} asked of a stack of {len(self)}: {self}")
        out = np.empty((hi - lo, *self.shape[1:]), self.dtype)
        for k, frame in enumerate(range(lo, hi)):
            self.read_into(frame, out[k])
        return out

    def __str__(self) -> str:
        """``stack.tif 20x512x512 uint16, map``."""
        more = f" and {len(self.parts) - 1} more" if len(self.parts) > 1 else ""
        shape = "x".join(map(str, self.shape))
        ways = "+".join(sorted(set(self.way)))
        return f"{self.parts[0].path.name}{more} {shape} {self.dtype.name}, {ways}"

    @cached_property
    def _first_pages(self) -> np.ndarray:
        """(n_parts + 1,): where each part's pages begin among those of all."""
        return np.cumsum([0, *(len(part.at) for part in self.parts)])

    def _find(self, frame: int) -> tuple[Part, int, int]:
        """The part that holds ``frame``, its page there, and the plane of the page."""
        if not 0 <= frame < len(self):
            raise ConfigError(f"frame {frame} asked of a stack of {len(self)}: {self}")
        page, plane = divmod(frame, self.parts[0].page.planes)
        if self.order is not None:
            page = int(self.order[page])
            if page == MISSING:
                raise InputError(
                    f"frame {frame} of {self.parts[0].path} lies in a file or page that is not "
                    "there; copy all files of the set, or ask for other frames"
                )
        k = int(np.searchsorted(self._first_pages, page, side="right")) - 1
        return self.parts[k], page - int(self._first_pages[k]), plane
