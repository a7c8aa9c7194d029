"""Pages as tifffile puts them together, in the form that is kept: some bytes a page, no objects.

tifffile's own objects, one a page at worst, are gone when the file has been understood.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from raypipe.errors import InputError
from raypipe.read.tiff.decoder import require_codec
from raypipe.read.tiff.ifd import TiffBytes, segment_tags
from raypipe.read.tiff.part import Part, encoding
from raypipe.read.tiff.places import MISSING, evenly, places


@dataclass(frozen=True, kw_only=True, eq=False)
class Indexed:
    """One file, or a set of files that one of them names.

    shape : as ``tifffile.imread`` gives it, by ``axes``
    order : (n_pages,) the place of each page among those of all parts; None: one after the other
    """

    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    axes: str
    order: np.ndarray | None = None

    def warned(self, warnings: Sequence[str]) -> Indexed:
        """The same, with what tifffile warned of in the first part's words."""
        if not warnings:
            return self
        first = replace(self.parts[0], why="; ".join([self.parts[0].why, *warnings[:3]]))
        return replace(self, parts=(first, *self.parts[1:]))


def by_series(series: tifffile.TiffPageSeries, path: Path) -> Indexed:
    """What tifffile took for the first image or stack of ``path``. Raises InputError."""
    key, kind = series.keyframe, series.kind
    require_codec(key, path)
    if series.transform is not None:
        raise InputError(f"{path} is scaled by a rule of its own ({kind}); save it as plain TIFF")
    shape, axes = tuple(series.shape), str(series.axes)
    offset = None if series.is_multifile else series.dataoffset
    if offset is not None:
        n_bytes = math.prod(key.shaped) * key.dtype.itemsize
        at = evenly(offset, n_bytes, math.prod(shape) // math.prod(key.shaped))
        part = Part.of(path, key, "map", f"one block of values ({kind})", at)
        return Indexed(parts=(part,), shape=shape, axes=axes)
    parts, order = _group(list(series), kind)
    return Indexed(parts=parts, shape=shape, axes=axes, order=order)


def _group(pages: Sequence[Any], kind: str) -> tuple[tuple[Part, ...], np.ndarray | None]:
    """The pages by file, and the order that puts them back."""
    files: dict[str, list[Any]] = {}
    found: list[tuple[str, int] | None] = []
    for page in pages:
        if page is None or not any(page.dataoffsets):
            found.append(None)
            continue
        mine = files.setdefault(page.parent.filehandle.path, [])
        found.append((page.parent.filehandle.path, len(mine)))
        mine.append(page)
    starts = np.cumsum([0, *(len(mine) for mine in files.values())]).tolist()
    before = dict(zip(files, starts, strict=False))
    order = np.array([MISSING if at is None else before[at[0]] + at[1] for at in found], np.int64)
    parts = tuple(_part(Path(name).absolute(), mine, kind) for name, mine in files.items())
    return parts, None if (order == np.arange(len(pages))).all() else order


def _part(path: Path, pages: list[Any], kind: str) -> Part:
    key = pages[0].keyframe
    if key.is_final and all(_in_one_piece(page) for page in pages):
        at = places([page.dataoffsets[0] for page in pages])
        return Part.of(path, key, "map", f"plain pages ({kind})", at)
    if any(page.offset <= 0 for page in pages):
        raise InputError(f"{path} holds pages without directories ({kind}); save it as OME-TIFF")
    _check_tables(path, [pages[0], pages[len(pages) // 2], pages[-1]])
    at = places([page.offset for page in pages])
    return Part.of(path, key, "pages", f"{encoding(key)} ({kind})", at)


def _in_one_piece(page: Any) -> bool:
    if len(page.dataoffsets) == 1:
        return True
    ends = [a + b for a, b in zip(page.dataoffsets, page.databytecounts, strict=False)]
    return ends[:-1] == list(page.dataoffsets[1:])


def _check_tables(path: Path, pages: list[Any]) -> None:
    """Raise InputError where tifffile mends a format's tables: here they are read as they stand."""
    fd = os.open(path, os.O_RDONLY)
    try:
        file = TiffBytes.of(fd, str(path))
        for page in pages:
            tag, _ = segment_tags(file, file.directory(page.offset))
            if tag is None or tuple(file.values(tag).tolist()) != tuple(page.dataoffsets):
                raise InputError(
                    f"{path} has a table of strips that is not as TIFF has it; save it as OME-TIFF"
                )
    finally:
        os.close(fd)
