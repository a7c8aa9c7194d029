"""The pages of a TIFF file without metadata of a stack: those that are like the first one.

A file of plain pages at even distances is known by a look at some twenty directories: the first
three, the last, and a sample in between. Any other chain is walked from page to page, which keeps
one number a page.
"""

from __future__ import annotations

from dataclasses import dataclass

from raypipe.errors import InputError
from raypipe.read.tiff.ifd import Directory, TiffBytes, alike, values_start
from raypipe.read.tiff.places import Places, Spaced, places

_SAMPLE = 16


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Pages that belong together.

    directories : where their directories lie
    values      : where their plain values lie; None when they do not lie in one piece each
    left_out    : pages of another size or kind
    """

    directories: Places
    values: Places | None
    left_out: int = 0


def find_pages(file: TiffBytes, page_bytes: int, *, plain: bool) -> Chain:
    """The pages like the first. plain : they are not compressed, and have ``page_bytes`` each."""
    if plain:
        found = _evenly_spaced(file, page_bytes)
        if found is not None:
            return found
    return _walk(file, page_bytes, plain=plain)


def _walk(file: TiffBytes, page_bytes: int, *, plain: bool) -> Chain:
    first: Directory | None = None
    directories: list[int] = []
    values: list[int] = []
    left_out = 0
    for page in file.chain():
        first = first or page
        if not alike(file, first, page):
            left_out += 1
            continue
        directories.append(page.at)
        start = values_start(file, page, page_bytes) if plain else None
        plain = start is not None
        values.append(start or 0)
    return Chain(
        directories=places(directories),
        values=places(values) if plain else None,
        left_out=left_out,
    )


def _evenly_spaced(file: TiffBytes, page_bytes: int) -> Chain | None:
    """The chain, if it is one of many plain pages at even distances."""
    first = file.directory(file.first)
    if not first.after:
        return None
    second = file.directory(first.after)
    if not second.after:
        return None
    step = second.after - second.at
    starts = [values_start(file, page, page_bytes) for page in (first, second)]
    if step < page_bytes or starts[0] is None or starts[1] is None:
        return None
    n = _count(file, second, step)
    if n is None or n < _SAMPLE:
        return None
    at = Spaced(first=first.at, second=second.at, step=step, n=n)
    values = Spaced(first=starts[0], second=starts[1], step=step, n=n)
    for page in {1 + (n - 2) * k // (_SAMPLE - 1) for k in range(_SAMPLE)}:
        if not _as_expected(file, first, page, at, values, page_bytes):
            return None
    return Chain(directories=at, values=values)


def _count(file: TiffBytes, second: Directory, step: int) -> int | None:
    """How many pages there are, if the last one stands where even distances put it."""
    most = (file.size - second.at) // step  # steps from the second page on
    for steps in (most, most - 1):
        try:
            if file.directory(second.at + steps * step).after == 0:
                return steps + 2
        except InputError:  # no directory there: the pages lie in another way
            continue
    return None


def _as_expected(
    file: TiffBytes, first: Directory, page: int, at: Spaced, start: Spaced, page_bytes: int
) -> bool:
    try:
        found = file.directory(at[page])
        after = at[page + 1] if page + 1 < at.n else 0
        same = found.after == after and alike(file, first, found)
        return same and values_start(file, found, page_bytes) == start[page]
    except InputError:
        return False
