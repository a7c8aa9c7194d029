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

from raypipe.errors import InputError, RaypipeError
from raypipe.read.tiff.complaints import complaints
from raypipe.read.tiff.ifd import JPEG_TABLES, Directory, TiffBytes
from raypipe.read.tiff.part import Part
from raypipe.read.tiff.segments import Grid

_JPEG = (6, 7, 34892, 33007)
# LZW, deflate by its three numbers, Zstandard by its two: bytes in, bytes out.
_INTO_ARRAYS = (5, 8, 32946, 50013, 50000, 34926)


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoder:
    """The decoder of all pages like one.

    function  : (bytes or None, segment) -> (values, where, shape), tifffile's; no state, no file
    codec     : (bytes, out=bytes): decompresses into (n,) uint8; None where it takes more than that
    unpredict : undoes the predictor in place; None where there is none
    empty     : the value of segments that were not written
    stored    : dtype in the file's byte order
    """

    function: Callable[..., Any]
    codec: Callable[..., Any] | None
    unpredict: Callable[..., Any] | None
    jpeg: bool
    empty: float
    grid: Grid
    stored: np.dtype[Any]

    def fits(self, out: np.ndarray) -> bool:
        """Whether ``out`` (rows, cols, samples), all of a segment on the page, is all of it."""
        grid = self.grid
        if self.codec is None or grid.seg_depth > 1 or not out.flags.c_contiguous:
            return False
        return out.shape[1] == grid.seg_width and (
            out.shape[0] == grid.seg_height or not grid.tiled
        )

    def decode_into(self, data: bytes, out: np.ndarray) -> bool:
        """Decode a segment into ``out``, if it fills it exactly; False: `decode` has to see to it."""
        assert self.codec is not None
        try:
            filled = self.codec(data, out=out.reshape(-1).view(np.uint8))
        except MemoryError:
            raise
        # Damaged, or with rows that the page does not have: tifffile's decoder tells, not this one.
        except Exception:
            return False
        if filled.nbytes != out.nbytes:
            return False
        if not self.stored.isnative:
            out.byteswap(inplace=True)
        if self.unpredict is not None:
            self.unpredict(out, axis=-2, out=out)
        return True

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
            return np.full(shape, self.empty, self.stored.newbyteorder("="))
        return values


def build_decoder(part: Part) -> Decoder:
    """The decoder of ``part``'s pages, from its key page. Raises InputError."""
    try:
        with complaints(part.path), tifffile.TiffFile(part.path) as tif:
            page = key_page(tif, part.keyframe)
            require_codec(page, part.path)
            return Decoder(
                function=page.decode,
                codec=_codec(page),
                unpredict=None if page.predictor == 1 else tifffile.TIFF.UNPREDICTORS[2],
                jpeg=page.compression in _JPEG,
                empty=page.nodata,
                grid=_grid(page),
                stored=part.stored,
            )
    except (RaypipeError, MemoryError):
        raise
    # On damaged tags tifffile raises nearly anything, a TypeError for instance.
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
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


def _codec(page: tifffile.TiffPage) -> Callable[..., Any] | None:
    """imagecodecs' function for ``page``, if its values need nothing else but a plain predictor."""
    simple = page.compression in _INTO_ARRAYS and page.predictor in (1, 2) and page.fillorder == 1
    if not simple or page.bitspersample not in (8, 16, 32, 64) or page.dtype.kind not in "iuf":
        return None
    if page.dtype.itemsize * 8 != page.bitspersample or page.is_subsampled:
        return None
    codec = tifffile.TIFF.DECOMPRESSORS[page.compression]
    return codec if codec.__module__.startswith("imagecodecs") else None


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
        tiled=bool(page.is_tiled),
    )
