"""A shuffle of ``range(n)`` as a function: position -> value, for one key, with no list in memory.

An alternating Feistel network permutes the smallest power of two that holds n; values outside
``range(n)`` walk on along their cycle until they land inside (Black and Rogaway, "Ciphers with
arbitrary finite domains", 2002). It is stateless, so any slice of any epoch's order is computed
alone, and it is our own arithmetic: `numpy.random.Generator.permutation` may change its stream
between numpy versions, which would change the order of a resumed run (`SeedSequence` may not).

Not a cipher. Who uses the order: `raypipe.stream.plan`; the draws: `raypipe.stream.split`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from raypipe.errors import ConfigError

# Four rounds are pseudo-random for large halves (Luby-Rackoff); domains of a few bits need more
# before every value is equally likely in every place (tests/stream/test_permutation.py counts).
_ROUNDS = 12
_MAX_N = 2**62


class KeyedPermutation:
    """The bijection of ``range(n)`` that belongs to ``key``.

    ``key``: one or more non-negative ints, e.g. ``(seed, epoch)``.
    Raises ConfigError when n is not in 1..2**62 or a key part is negative.
    """

    def __init__(self, n: int, key: Sequence[int]) -> None:
        if not 1 <= n <= _MAX_N:
            raise ConfigError(f"a permutation of {n} rows: give between 1 and 2**62 rows")
        if not key or any(part < 0 for part in key):
            raise ConfigError(f"permutation key {tuple(key)}: give non-negative whole numbers")
        bits = max(2, (n - 1).bit_length())
        self.n = n
        self._low_bits = bits // 2
        self._high_bits = bits - self._low_bits
        self._round_keys = _keys(key, _ROUNDS)

    def __len__(self) -> int:
        return self.n

    def __call__(self, positions: ArrayLike) -> np.ndarray:
        """Values at ``positions``, int64, same shape. Raises ConfigError outside ``range(n)``."""
        asked = np.asarray(positions, dtype=np.int64)
        if asked.size and (asked.min() < 0 or asked.max() >= self.n):
            raise ConfigError(
                f"position {asked.min()}..{asked.max()} is outside a permutation of {self.n} rows"
            )
        values = self._network(asked.astype(np.uint64).ravel())
        outside = np.flatnonzero(values >= self.n)
        while outside.size:  # fewer than half of the values each turn, on average
            walked = self._network(values[outside])
            values[outside] = walked
            outside = outside[walked >= self.n]
        return values.astype(np.int64).reshape(asked.shape)

    def _network(self, values: np.ndarray) -> np.ndarray:
        """One pass over ``values`` (uint64, below 2**bits): a bijection of that power of two."""
        low_mask = np.uint64((1 << self._low_bits) - 1)
        high, low = values >> np.uint64(self._low_bits), values & low_mask
        for turn, key in enumerate(self._round_keys):
            if turn % 2 == 0:
                high = high ^ (_mix(low ^ key) >> np.uint64(64 - self._high_bits))
            else:
                low = low ^ (_mix(high ^ key) >> np.uint64(64 - self._low_bits))
        return (high << np.uint64(self._low_bits)) | low


def keyed_draws(numbers: np.ndarray, sizes: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
    """For each of ``numbers`` a draw from ``range(size)`` that belongs to (number, key), int64.

    ``numbers``, ``sizes``: int64 of one shape, from 0 and from 1 on. Even to a part in 2**64 / size.
    """
    once, again = _draw_keys(key)
    drawn = _mix(_mix(numbers.astype(np.uint64).ravel() + once) ^ again)
    even = drawn % sizes.astype(np.uint64).ravel()
    return even.astype(np.int64).reshape(numbers.shape)


@lru_cache(maxsize=16)
def _draw_keys(key: tuple[int, ...]) -> np.ndarray:
    return _keys(key, 2)


def _keys(key: Sequence[int], count: int) -> np.ndarray:
    """(count,) uint64 that belong to ``key``."""
    # spawn_key keeps (seed, epoch) apart from (epoch, seed) and from seeds above 32 bits.
    sequence = np.random.SeedSequence(int(key[0]), spawn_key=tuple(int(k) for k in key[1:]))
    return sequence.generate_state(count, np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every input bit reaches every output bit (uint64, wraps)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
