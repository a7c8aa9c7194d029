"""Which pictures train, which choose the epoch, which are only tested on. Pure.

A source is a file, or the files of one OME image (``ome_sets``). Neighbouring pages of one stack show
nearly the same; with one on each side a validation score would measure memory. So all pages of a source
stand on one side, unless ``by="page"`` is asked for, or the table gives regions that do not touch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np

from raypipe.errors import ConfigError, InputError
from raypipe.segment.ome_sets import source_of
from raypipe.segment.pictures import Picture

SplitBy = Literal["source", "page"]
Sets = Mapping[Path, Path]
Region = tuple[tuple[int, int], tuple[int, int]]


def divide(
    pictures: Sequence[Picture],
    *,
    by: SplitBy,
    val_fraction: float,
    seed: int,
    sets: Sets = MappingProxyType({}),
) -> list[Picture]:
    """``pictures`` with every split known, in their order; those that name theirs keep it.

    sets : the first file of the set that a file is of, where it is of one; see `ome_sets.sets_of`

    Of the others ``val_fraction`` of the units (files and sets, or pages) validate, at least one: a
    function of (names, fraction, seed), the same on every machine; none where some validate already.
    Raises ConfigError when nothing would be left to train on or to validate with, InputError when one
    source stands on two sides.
    """
    open_units = sorted({_unit(p, by, sets) for p in pictures if not p.split})
    chosen: set[tuple[str, int]] = set()
    if open_units and not any(p.split == "val" for p in pictures):
        trains = any(p.split == "train" for p in pictures)
        chosen = _held_out(open_units, val_fraction, seed, by, keep=0 if trains else 1)
    found = [p if p.split else replace(p, split=_side(p, by, sets, chosen)) for p in pictures]
    check_apart(found, by, sets)
    for split in ("train", "val"):
        if not any(p.split == split for p in found):
            raise ConfigError(f"no picture is in split {split!r}; give some in the table or folder")
    return found


def check_apart(
    pictures: Iterable[Picture], by: SplitBy, sets: Sets = MappingProxyType({})
) -> None:
    """Raise InputError when pixels, or (``by="source"``) pages of one source, stand on two sides."""
    sides: dict[tuple[Path, int], dict[tuple[str, Region], Picture]] = {}
    for p in pictures:
        place = (p.image, p.frame) if by == "page" else (source_of(p.image, sets), -1)
        sides.setdefault(place, {}).setdefault((p.split, (p.rows, p.cols)), p)
    for groups in sides.values():
        for one, other in combinations(groups.values(), 2):
            if one.split != other.split and _touch(one, other):
                file = (
                    "" if one.image == other.image else f"{other.image.name} of its OME-TIFF set "
                )
                raise InputError(
                    f"{one.image.name} stands in {one.split} (page {one.frame}) and {file}in {other.split}"
                    f" (page {other.frame}), on the same pixels; keep a {'set' if file else 'file'} in one"
                    " split, give regions apart (rows, cols), or --split-by page to divide its pages"
                )


def asks_for_sets(pictures: Sequence[Picture], by: SplitBy) -> bool:
    """Whether `divide` looks at sets: a split is open, or two sides may have the same pixels."""
    if by == "page" or (all(p.split for p in pictures) and not _sides_touch(pictures)):
        return False
    return len({p.image for p in pictures}) > 1


def _sides_touch(pictures: Iterable[Picture]) -> bool:
    """Whether the boxes around two sides share a pixel position."""
    boxes: dict[str, Picture] = {}
    for p in pictures:
        box = boxes.setdefault(p.split, p)
        rows, cols = _around(box.rows, p.rows), _around(box.cols, p.cols)
        boxes[p.split] = replace(box, rows=rows, cols=cols)
    return any(_touch(one, other) for one, other in combinations(boxes.values(), 2))


def _around(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return min(one[0], other[0]), max(one[1], other[1])


def _touch(one: Picture, other: Picture) -> bool:
    """Whether two regions share a pixel position."""
    spans = ((one.rows, other.rows), (one.cols, other.cols))
    return all(a[0] < b[1] and b[0] < a[1] for a, b in spans)


def _unit(p: Picture, by: SplitBy, sets: Sets) -> tuple[str, int]:
    return (str(p.image), p.frame) if by == "page" else (str(source_of(p.image, sets)), 0)


def _side(p: Picture, by: SplitBy, sets: Sets, chosen: set[tuple[str, int]]) -> str:
    return "val" if _unit(p, by, sets) in chosen else "train"


def _held_out(
    units: Sequence[tuple[str, int]], fraction: float, seed: int, by: SplitBy, keep: int
) -> set[tuple[str, int]]:
    n = max(1, round(fraction * len(units)))
    if len(units) - n < keep:
        raise ConfigError(
            f"{len(units)} {by} cannot be divided into training and validation; add images, give regions in"
            " a table (rows, cols)" + (", or --split-by page" if by == "source" else "")
        )
    order = np.random.default_rng([seed, len(units)]).permutation(len(units))
    return {units[i] for i in order[:n]}
