"""`open_tiff`: a file, a folder, or a list of files as one `TiffStack`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from raypipe.errors import InputError, MissingInput
from raypipe.read.tiff.index import index_file
from raypipe.read.tiff.lazy import LazyStack
from raypipe.read.tiff.places import MISSING
from raypipe.read.tiff.series import Indexed
from raypipe.read.tiff.stack import TiffStack

Paths = Path | str | Iterable[Path | str]
_SUFFIXES = (".tif", ".tiff")


def load_tiff_stack(path: Paths) -> LazyStack:
    """The array that ``tifffile.imread`` would give, read by what is asked of it.

    path : a TIFF file; a folder of them, in the order of the numbers in their names; or a list
    Several files become one leading axis, (n_frames, height, width[, channels]).
    Raises MissingInput, InputError.
    """
    return LazyStack(open_tiff(path))


def open_tiff(paths: Paths, *, alone: bool = True) -> TiffStack:
    """The stack in ``paths`` (as `load_tiff_stack`'s), behind one global frame index.

    alone : a single file of an OME-TIFF set brings the others with it; False: each file has only the
    pages that lie in it, as in a list. Only what says where the pages lie is read. Raises MissingInput,
    InputError.
    """
    files = tiff_files(paths)
    if len(files) == 1:
        return _stack(index_file(files[0], alone=alone))
    return _joined([index_file(file, alone=False) for file in files])


def tiff_files(paths: Paths) -> tuple[Path, ...]:
    """The files that ``paths`` means; those of a folder as 1, 2, 10 and not 1, 10, 2."""
    if not isinstance(paths, (str, Path)):
        files = tuple(Path(path) for path in paths)
        if not files:
            raise MissingInput("an empty list of TIFF files was given; give at least one")
        return files
    path = Path(paths)
    if not path.is_dir():
        return (path,)
    with os.scandir(path) as entries:
        names = [entry.name for entry in entries if entry.name.lower().endswith(_SUFFIXES)]
    names = sorted((name for name in names if not name.startswith(".")), key=_natural)
    if not names:
        raise MissingInput(
            f"folder {path} holds no {' or '.join(_SUFFIXES)} file; give one that does"
        )
    return tuple(path / name for name in names)


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Numbers in a name by their value: ``f2`` before ``f10``; then by their text."""
    parts = re.split(r"(\d+)", name)
    key: list[tuple[int, int | str]] = [
        (0, int(part)) if part.isdigit() else (1, part) for part in parts
    ]
    return [*key, (2, name)]


def _stack(found: Indexed) -> TiffStack:
    first = found.parts[0]
    n_pages = len(found.order) if found.order is not None else sum(len(p.at) for p in found.parts)
    n_frames = n_pages * first.page.planes
    frame = _frame_shape(found, n_frames)
    series, axes = found.shape, found.axes
    if frame is None:  # the file's own shape is not one of images: its frames as they are
        page = first.page
        frame = (page.height, page.width) + (page.samples,) * (page.samples > 1)
        series, axes = (n_frames, *frame), "IYXS"[: 1 + len(frame)]
    _check_alike(found)
    return TiffStack(
        parts=found.parts,
        shape=(n_frames, *frame),
        dtype=first.stored.newbyteorder("="),
        series_shape=series,
        axes=axes,
        order=found.order,
    )


def _frame_shape(found: Indexed, n_frames: int) -> tuple[int, ...] | None:
    """The last axes of the file's shape that are one frame's; None if they are not."""
    page = found.parts[0].page
    full = (page.height, page.width, page.samples)
    for frame in (full[:2], full) if page.samples == 1 else (full,):
        lead = found.shape[: -len(frame)]
        if found.shape[-len(frame) :] == frame and math.prod(lead) == n_frames:
            return frame
    return None


def _check_alike(found: Indexed) -> None:
    first = found.parts[0]
    for part in found.parts[1:]:
        if part.page != first.page or part.stored.newbyteorder("=") != first.stored.newbyteorder(
            "="
        ):
            raise InputError(
                f"{part.path.name} has pages of {_words(part)}, {first.path.name} of {_words(first)}; "
                "a stack has one size and dtype: sort them apart"
            )


def _words(part: object) -> str:
    page = part.page  # type: ignore[attr-defined]
    return f"{page.height}x{page.width}x{page.samples} {part.stored.name}"  # type: ignore[attr-defined]


def _joined(files: list[Indexed]) -> TiffStack:
    """Several files one after the other, each in its own order."""
    parts = tuple(part for found in files for part in found.parts)
    orders: list[np.ndarray] = []
    start = 0
    for found in files:
        n = sum(len(part.at) for part in found.parts)
        own = np.arange(n) if found.order is None else found.order
        orders.append(np.where(own == MISSING, MISSING, own + start))
        start += n
    order = np.concatenate(orders)
    plain = bool((order == np.arange(len(order))).all())
    page = parts[0].page
    frame = (page.height, page.width) + (page.samples,) * (page.samples > 1)
    n_frames = len(order) * page.planes
    return _stack(
        Indexed(
            parts=parts,
            shape=(n_frames, *frame),
            axes="IYXS"[: 1 + len(frame)],
            order=None if plain else order,
        )
    )
