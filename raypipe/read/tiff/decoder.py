"""How a page's strips or tiles are decoded: by tifffile's decoder, built once for all like pages.

tifffile knows some forty compressions, half of them through the package imagecodecs; which one is
missing is said when a file is opened, not at the first frame.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from raypipe.errors import InputError
from raypipe.read.tiff.complaints import complaints
from raypipe.read.tiff.ifd import JPEG_TABLES, Directory, TiffBytes
from raypipe.read.tiff.part import Part
from raypipe.read.tiff.segments import Grid

_JPEG = (6, 7, 34892, 33007)


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoder:
    """The decoder of all pages like one.

    function : (bytes or None, segment) -> (values, where, shape), tifffile's; no state, no file
    empty    : the value of segments that were not written
    """

    function: Callable[..., Any]
    jpeg: bool
    empty: float
    grid: Grid
    samples: int
    dtype: np.dtype[Any]

    def decode(
        self, file: TiffBytes, directory: Directory, segment: int, data: bytes | None
    ) -> np.ndarray:
        """Values (depth, height, width, samples) of a segment, in native byte order."""
        options = {}
        tables = file.tag(directory, JPEG_TABLES) if self.jpeg else None
        if tables is not None:
            options["jpegtables"] = file.raw(tables)
        try:
            values, _, shape = self.function(data, segment, **options)
        except MemoryError:
            raise
        # Codecs raise nearly anything on damaged bytes; all of it says one thing about the file.
        except Exception as error:
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(
                f"{file.path}: strip or tile {segment} of the page at byte {directory.at} cannot "
                f"be decoded ({why}); the file is damaged: copy it again"
            ) from error
        if values is None:
            return np.full(shape, self.empty, self.dtype)
        return values


def build_decoder(part: Part) -> Decoder:
    """The decoder of ``part``'s pages, from its key page. Raises InputError."""
    try:
        with complaints(part.path), tifffile.TiffFile(part.path) as tif:
            page = key_page(tif, part.keyframe)
            require_codec(page, part.path)
            return Decoder(
                function=page.decode,
                jpeg=page.compression in _JPEG,
                empty=page.nodata,
                grid=_grid(page),
                samples=part.page.samples,
                dtype=part.stored.newbyteorder("="),
            )
    except (tifffile.TiffFileError, ValueError, OSError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"{part.path} cannot be read ({why}); copy it again") from error


def key_page(tif: tifffile.TiffFile, at: int) -> tifffile.TiffPage:
    """The page whose directory is at byte ``at``."""
    first = tif.pages.first
    if at == first.offset:
        return first
    tif.filehandle.seek(at)
    return tifffile.TiffPage(tif, index=1)


def require_codec(page: tifffile.TiffPage, path: Path) -> None:
    """Raise InputError, naming codec and package, if ``page`` cannot be decoded here."""
    for kind, number, known in (
        ("compressed by", page.compression, tifffile.TIFF.DECOMPRESSORS),
        ("stored with predictor", page.predictor, tifffile.TIFF.UNPREDICTORS),
    ):
        if number == 1 or (known is tifffile.TIFF.UNPREDICTORS and page.compression in _JPEG):
            continue
        try:
            known[number]
        except KeyError as error:
            raise InputError(f"{path} is {kind} {_name(number)}, {_remedy(str(error))}") from error


def _remedy(why: str) -> str:
    if "imagecodecs" not in why:
        return "which tifffile does not read; save it with deflate, LZW or no compression"
    if importlib.util.find_spec("imagecodecs") is None:
        return "which needs the package imagecodecs: pip install imagecodecs"
    return "which the imagecodecs installed here lacks: pip install --upgrade imagecodecs"


def _name(number: Any) -> str:
    return str(getattr(number, "name", number)).removeprefix("ADOBE_")


def _grid(page: tifffile.TiffPage) -> Grid:
    _, depth, height, width, _ = page.shaped
    return Grid(
        depth=depth,
        height=height,
        width=width,
        seg_depth=page.tiledepth if page.is_tiled else 1,
        seg_height=page.tilelength if page.is_tiled else page.rowsperstrip,
        seg_width=page.tilewidth if page.is_tiled else width,
    )
