"""A shuffle for disks that dislike jumping: blocks in random order, rows mixed among a few of them.

The rows are cut into blocks of neighbours; blocks come in shuffled order; the sequence that they
make is cut into windows, and inside each window rows are shuffled. So a window's rows lie in
few pieces of the file and are read in large requests, while a batch mixes rows of several
blocks. A pure function of (n, window, key) like `raypipe.stream.permutation`, whose shuffles it is
made of: any position alone, nothing of size n in memory.

Its price is measured by `shuffle_quality`: neighbours in the stream are related, by about one part
in `BLOCKS` (tests/stream/test_window.py holds the figures).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from raypipe.errors import ConfigError
from raypipe.stream.permutation import KeyedPermutation

#: Blocks a window: a correlation of neighbours of some 1/16, and requests of 1/16 of a window.
BLOCKS = 16


class WindowShuffle:
    """The bijection of ``range(n)`` that belongs to ``key`` and ``window`` (rows).

    ``key``: non-negative ints, e.g. ``(seed, epoch)``. A window of n rows or more is a global
    shuffle. Raises ConfigError for a window below 1, and as `KeyedPermutation`.
    """

    def __init__(self, n: int, window: int, key: Sequence[int]) -> None:
        if window < 1:
            raise ConfigError(f"shuffle window of {window} rows: give at least 1")
        self._rows = KeyedPermutation(n, (*key, 0))  # checks n and key
        self.n, self.window, self._key = n, min(window, n), tuple(key)
        self.block = max(1, self.window // BLOCKS)
        self._whole, self._tail = divmod(n, self.block)
        # The last block is smaller: where it comes is drawn apart, so that all others stay alike.
        if self._tail:
            slots = KeyedPermutation(self._whole + 1, (*key, 1))
            self._tail_at = int(slots([0])[0]) * self.block
        else:
            self._tail_at = n
        self._blocks = KeyedPermutation(self._whole, (*key, 2)) if self._whole else None

    def __len__(self) -> int:
        return self.n

    def __call__(self, positions: ArrayLike) -> np.ndarray:
        """Values at ``positions``, int64, same shape. Raises ConfigError outside ``range(n)``."""
        asked = np.asarray(positions, dtype=np.int64)
        if asked.size and not 0 <= asked.min() <= asked.max() < self.n:
            raise ConfigError(
                f"position {asked.min()}..{asked.max()} is outside a shuffle of {self.n} rows"
            )
        if self.window == self.n:
            return self._rows(asked)
        flat = asked.ravel()
        mixed = np.empty_like(flat)
        windows = flat // self.window
        for window in np.unique(windows).tolist():
            here = windows == window
            first = window * self.window
            size = min(self.window, self.n - first)
            inside = KeyedPermutation(size, (*self._key, 3, window))
            mixed[here] = first + inside(flat[here] - first)
        return self._unblock(mixed).reshape(asked.shape)

    def _unblock(self, places: np.ndarray) -> np.ndarray:
        """Places in the sequence of shuffled blocks -> values."""
        past = places >= self._tail_at + self._tail
        in_tail = (places >= self._tail_at) & ~past
        values = self._whole * self.block + places - self._tail_at  # right in the tail only
        whole = (places - past * self._tail)[~in_tail]
        if self._blocks is not None:
            values[~in_tail] = self._blocks(whole // self.block) * self.block + whole % self.block
        return values


@dataclass(frozen=True)
class ShuffleQuality:
    """How near an order is to a global shuffle, which has (1, 0, 1 / n).

    displacement: mean distance of a row from its place in the file, over what a global shuffle
    would have on average. neighbour_correlation: Pearson's r of rows that follow each other.
    adjacent: share of neighbours in the stream that are neighbours in the file, in order.
    """

    displacement: float
    neighbour_correlation: float
    adjacent: float


def shuffle_quality(order: ArrayLike) -> ShuffleQuality:
    """Measure ``order`` (n,), a permutation of ``range(n)``, n >= 3: e.g. one epoch of a plan.

    Raises ConfigError when it is none.
    """
    rows = np.asarray(order, dtype=np.int64)
    n = rows.size
    if rows.ndim != 1 or n < 3 or not np.array_equal(np.sort(rows), np.arange(n)):
        raise ConfigError(f"order of shape {rows.shape}: give a permutation of 3 or more rows")
    expected = (n * n - 1) / (3 * n)  # mean |i - j| of two independent even draws
    return ShuffleQuality(
        displacement=float(np.abs(rows - np.arange(n)).mean() / expected),
        neighbour_correlation=float(np.corrcoef(rows[:-1], rows[1:])[0, 1]),
        adjacent=float((np.diff(rows) == 1).mean()),
    )
