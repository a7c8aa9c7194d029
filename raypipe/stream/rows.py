"""The rows of a plan in ascending order, with no list of them where a few numbers say it all.

An int array is kept, sorted; a Python ``range`` becomes a `RowRange`, which gives the parts of that
array that are asked for, and has its digest, taken in chunks. The two parts of a split are
`raypipe.stream.split`'s. The order in which rows are seen is `raypipe.stream.plan`'s.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import ArrayLike

from raypipe.errors import ConfigError

# Rows hashed at once: 512 KiB, in the cache.
_CHUNK = 1 << 16


@dataclass(frozen=True, kw_only=True)
class ComputedRows(ABC):
    """``size`` ascending rows that are computed when they are asked for; read like an int64 array."""

    size: int

    @abstractmethod
    def at(self, places: np.ndarray) -> np.ndarray:
        """Rows at ``places``, int64, all in ``range(size)``; same shape."""

    def digest(self) -> str:
        """sha256 that tells these rows from others; here that of their array."""
        return _hashed(self)

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, places: int | np.integer) -> int: ...
    @overload
    def __getitem__(self, places: slice | np.ndarray) -> np.ndarray: ...
    def __getitem__(self, places: int | np.integer | slice | np.ndarray) -> int | np.ndarray:
        """Rows at ``places`` in ``range(size)``: an int, or int64 for a slice or an int array.

        Raises IndexError for other places, and for arrays that are no whole numbers, such as a mask.
        """
        if isinstance(places, slice):
            found = range(self.size)[places]
            return self.at(np.arange(found.start, found.stop, found.step, dtype=np.int64))
        if isinstance(places, np.ndarray):
            if places.dtype.kind not in "iu":
                raise IndexError(
                    f"places: {places.dtype} {places.shape}; give whole numbers, of a mask np.flatnonzero"
                )
            if places.size and not 0 <= places.min() <= places.max() < self.size:
                raise IndexError(f"place {places.min()}..{places.max()} of {self.size} rows")
            return self.at(places.astype(np.int64))
        return int(self.at(np.array([range(self.size)[int(places)]]))[0])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        whole = self[:]
        return whole if dtype is None else whole.astype(dtype)


@dataclass(frozen=True, kw_only=True)
class RowRange(ComputedRows):
    """The rows ``start, start + step, ...``, ``size`` of them."""

    start: int
    step: int

    @classmethod
    def of(cls, rows: range) -> RowRange:
        """The rows of ``rows`` in ascending order. Raises ConfigError for none or below 0."""
        if len(rows) == 0:
            raise ConfigError(_NONE)
        first, last = sorted((rows[0], rows[-1]))
        if first < 0 or last >= 2**62:
            raise ConfigError(f"plan rows: {rows}; rows count from 0 to below 2**62")
        return cls(size=len(rows), start=first, step=abs(rows.step))

    def at(self, places: np.ndarray) -> np.ndarray:
        return self.start + places * self.step


def sorted_rows(rows: ArrayLike | range | ComputedRows) -> np.ndarray | ComputedRows:
    """``rows`` in ascending order, read-only int64; a range stays one, and computed rows what they are.

    Raises ConfigError unless they are distinct whole numbers from 0 on, in one dimension.
    """
    if isinstance(rows, ComputedRows):
        return rows
    if isinstance(rows, range):
        return RowRange.of(rows)
    listed = np.asarray(rows)
    if listed.size == 0:
        raise ConfigError(_NONE)
    if listed.ndim != 1 or not np.issubdtype(listed.dtype, np.integer):
        raise ConfigError(f"plan rows: {listed.dtype} {listed.shape}; give a 1-D integer array")
    unique = np.unique(listed).astype(np.int64)
    if unique.size != listed.size or unique[0] < 0:
        raise ConfigError(
            f"plan rows: {listed.size - unique.size} repeated, smallest {unique[0]}; "
            "each row may be listed once, and counts from 0"
        )
    unique.setflags(write=False)
    return unique


def rows_digest(rows: np.ndarray | ComputedRows) -> str:
    """sha256 of the rows: an array and a range that list the same rows have the same."""
    return rows.digest() if isinstance(rows, ComputedRows) else _hashed(rows)


def _hashed(rows: np.ndarray | ComputedRows) -> str:
    """Of the rows as little-endian int64: 8 bytes a row are hashed, few held at once."""
    digest = hashlib.sha256()
    for lo in range(0, rows.size, _CHUNK):
        digest.update(rows[lo : lo + _CHUNK].astype("<i8").data)
    return digest.hexdigest()


def runs_of(rows: np.ndarray | Sequence[int]) -> list[tuple[int, int]]:
    """Ascending ``rows`` as ranges [lo, hi) of neighbours; a repeated row counts once."""
    ascending = np.asarray(rows, dtype=np.int64)
    if ascending.size == 0:
        return []
    cuts = np.flatnonzero(np.diff(ascending) > 1) + 1
    firsts = ascending[np.concatenate([[0], cuts])]
    lasts = ascending[np.concatenate([cuts - 1, [ascending.size - 1]])]
    return [(int(lo), int(hi) + 1) for lo, hi in zip(firsts, lasts, strict=True)]


_NONE = "plan rows: none; training needs at least one valid row"
