"""Where the pages of a file lie: byte offsets, those evenly spaced in four numbers. Pure.

A stack of tens of thousands of pages is then as cheap to pickle as one page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: The place of a page that is not there (a multi-file OME-TIFF without one of its files).
MISSING = -1


@dataclass(frozen=True, kw_only=True)
class Spaced:
    """``n`` offsets: ``first``, then ``second`` and every ``step`` bytes from there.

    The first page lies apart where its directory holds a description that the others lack.
    """

    first: int
    second: int
    step: int
    n: int

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, page: int) -> int:
        if not 0 <= page < self.n:
            raise IndexError(page)
        return self.first if page == 0 else self.second + (page - 1) * self.step

    @property
    def last(self) -> int:
        """The largest offset; steps go forwards."""
        return max(self.first, self[self.n - 1])


Places = Spaced | np.ndarray  # the array: (n,) int64


def evenly(first: int, step: int, n: int) -> Spaced:
    """``n`` places, one every ``step`` bytes."""
    return Spaced(first=first, second=first + step, step=step, n=n)


def places(offsets: Sequence[int] | np.ndarray) -> Places:
    """``offsets`` in the shorter of the two forms."""
    listed = np.asarray(offsets, dtype=np.int64)
    if len(listed) < 3 or listed.min() < 0:
        return listed
    steps = np.diff(listed[1:])
    if steps[0] <= 0 or (steps != steps[0]).any():
        return listed
    return Spaced(first=int(listed[0]), second=int(listed[1]), step=int(steps[0]), n=len(listed))


def largest(at: Places) -> int:
    """The place nearest to the end of the file."""
    return at.last if isinstance(at, Spaced) else int(at.max())
