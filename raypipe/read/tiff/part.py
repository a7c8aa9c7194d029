"""One file's share of a stack: which pages, where they lie, how they are read. Opens nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from raypipe.errors import InputError
from raypipe.read.tiff.places import Places, largest

Way = Literal["map", "pages"]


@dataclass(frozen=True, kw_only=True)
class PageShape:
    """One page: ``planes`` frames (separate samples times depth, mostly 1) of (height, width, samples)."""

    separate: int
    depth: int
    height: int
    width: int
    samples: int

    @classmethod
    def of(cls, page: Any) -> PageShape:
        """Of a tifffile page."""
        separate, depth, height, width, samples = page.shaped
        return cls(separate=separate, depth=depth, height=height, width=width, samples=samples)

    @property
    def planes(self) -> int:
        """Frames a page."""
        return self.separate * self.depth

    @property
    def plane_items(self) -> int:
        """Values of a frame."""
        return self.height * self.width * self.samples


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Pages of one TIFF file.

    way      : "map": plain values at known places, copied straight out of the file;
               "pages": compressed or tiled, decoded strip by strip or tile by tile
    why      : the same in words, and what was left out
    at       : of each page the offset of its values ("map") or of its directory ("pages")
    stored   : dtype in the file's byte order
    keyframe : offset of the directory whose decoder all pages share
    size_bytes, mtime_ns : of the file when it was indexed
    """

    path: Path
    size_bytes: int
    mtime_ns: int
    way: Way
    why: str
    at: Places
    page: PageShape
    stored: np.dtype[Any]
    keyframe: int

    @classmethod
    def of(cls, path: Path, page: Any, way: Way, why: str, at: Places) -> Part:
        """Of pages like tifffile's ``page``. Raises InputError for a file that ends before they do."""
        stat = path.stat()
        made = cls(
            path=path,
            size_bytes=stat.st_size,
            mtime_ns=stat.st_mtime_ns,
            way=way,
            why=why,
            at=at,
            page=PageShape.of(page),
            stored=np.dtype(page.parent.byteorder + page.dtype.char),
            keyframe=page.offset,
        )
        end = largest(at) + (made.page_bytes if way == "map" else 1)
        if end > made.size_bytes:
            raise InputError(
                f"{path} holds {made.size_bytes} bytes, its {len(at)} pages need {end}; it was cut "
                "short: copy it again"
            )
        return made

    @property
    def n_frames(self) -> int:
        """Frames of this file."""
        return len(self.at) * self.page.planes

    @property
    def plane_bytes(self) -> int:
        """Bytes of one frame's values, decoded."""
        return self.page.plane_items * int(self.stored.itemsize)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page's values, decoded."""
        return self.plane_bytes * self.page.planes

    @property
    def key(self) -> tuple[str, int, int]:
        """The file as it was indexed."""
        return str(self.path), self.size_bytes, self.mtime_ns


def encoding(page: Any) -> str:
    """How a tifffile page stores its values: ``LZW strips``, ``plain tiles``."""
    kind = "tiles" if page.is_tiled else "strips"
    name = str(getattr(page.compression, "name", page.compression)).removeprefix("ADOBE_")
    return f"plain {kind}" if name == "NONE" else f"{name} {kind}"
