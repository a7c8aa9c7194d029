"""How one TIFF file is understood: its pages in order, as `Part` s, and its shape in its own axes.

Files that say how their pages belong together (OME, ImageJ, tifffile's own, Micro-Manager, …) are
understood by tifffile (``series``); the pages of all others are found by ``chain``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import tifffile

from raypipe.errors import InputError, MissingInput
from raypipe.read.tiff.chain import find_pages
from raypipe.read.tiff.complaints import complaints
from raypipe.read.tiff.decoder import require_codec
from raypipe.read.tiff.ifd import TiffBytes
from raypipe.read.tiff.part import Part, encoding
from raypipe.read.tiff.series import Indexed, by_series

# Kinds of files with metadata of their own, in the order in which tifffile asks for them.
_KINDS = (
    *("shaped", "lsm", "mmstack", "ome", "imagej", "ndtiff", "fluoview", "stk", "sis", "svs"),
    *("scn", "qpi", "ndpi", "bif", "avs", "eer", "philips", "scanimage", "nih", "mdgel"),
)
# Their values or tables are mended by tifffile as it reads them page by page.
_REFUSED = ("ndpi", "eer", "mdgel")


def index_file(path: Path, *, alone: bool = True) -> Indexed:
    """Understand the file at ``path``. Raises MissingInput, InputError.

    alone : follow it to further files that it names; else it is one of a list, and only itself
    """
    path = path.absolute()
    options: dict[str, Any] = {}
    if not alone:
        options = {"_multifile": False, "is_mmstack": False, "is_ndtiff": False}
    try:
        with complaints(path) as warned, tifffile.TiffFile(path, **options) as tif:
            return _understand(tif, path).warned(warned)
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is not there; give the path of a TIFF file") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); mend it") from error
    except (InputError, MemoryError):
        raise
    # What tifffile meets in damaged files raises nearly anything: struct.error, IndexError, its own
    # error. All of it says one thing about this file.
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{path} cannot be read as TIFF ({why}); it is damaged or another format: copy or "
            "convert it again"
        ) from error


def _understand(tif: tifffile.TiffFile, path: Path) -> Indexed:
    if not tif.pages or not math.prod(tif.pages.first.shape) or tif.pages.first.dtype is None:
        raise InputError(f"{path} holds no image that can be read; save it again")
    kind = next((kind for kind in _KINDS if getattr(tif, "is_" + kind, False)), None)
    if kind in _REFUSED:
        raise InputError(f"{path} is {kind.upper()}, which is not read here; save it as OME-TIFF")
    if kind is not None:
        return by_series(tif.series[0], path)
    return _by_chain(tif, path)


def _by_chain(tif: tifffile.TiffFile, path: Path) -> Indexed:
    page = tif.pages.first
    require_codec(page, path)
    file = TiffBytes.of(tif.filehandle.fileno(), str(path))
    n_bytes = math.prod(page.shaped) * page.dtype.itemsize
    chain = find_pages(file, n_bytes, plain=page.is_final)
    left_out = f"; {chain.left_out} pages of another kind are left out" if chain.left_out else ""
    if chain.values is not None:
        part = Part.of(path, page, "map", "plain pages" + left_out, chain.values)
    else:
        part = Part.of(path, page, "pages", encoding(page) + left_out, chain.directories)
    n = len(part.at)
    return Indexed(
        parts=(part,),
        shape=tuple(page.shape) if n == 1 else (n, *page.shape),
        axes=page.axes if n == 1 else "I" + page.axes,
    )
