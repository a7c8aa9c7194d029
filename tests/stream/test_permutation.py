"""The keyed permutation: a bijection, even, and the same as a slow one in Python ints."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypipe.errors import ConfigError
from raypipe.stream import KeyedPermutation


def slow(n: int, key: tuple[int, ...], position: int) -> int:
    """The same network for one position, in unbounded ints that wrap nowhere by accident."""
    wrap = (1 << 64) - 1
    keys = np.random.SeedSequence(key[0], spawn_key=key[1:]).generate_state(12, np.uint64)
    bits = max(2, (n - 1).bit_length())
    low_bits, high_bits = bits // 2, bits - bits // 2

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & wrap
        return x ^ (x >> 31)

    value = position
    while True:
        high, low = value >> low_bits, value & ((1 << low_bits) - 1)
        for turn, k in enumerate(int(k) for k in keys):
            if turn % 2 == 0:
                high ^= mix(low ^ k) >> (64 - high_bits)
            else:
                low ^= mix(high ^ k) >> (64 - low_bits)
        value = (high << low_bits) | low
        if value < n:
            return value


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**70), epoch=st.integers(0, 2**40))
@settings(max_examples=150, deadline=None)
def test_it_is_a_bijection_of_range_n(n: int, seed: int, epoch: int) -> None:
    values = KeyedPermutation(n, (seed, epoch))(np.arange(n))
    assert values.dtype == np.int64
    assert np.array_equal(np.sort(values), np.arange(n))


@given(n=st.integers(1, 2**62), seed=st.integers(0, 2**32), position=st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_it_equals_the_slow_one(n: int, seed: int, position: int) -> None:
    key = (seed, 3)
    assert KeyedPermutation(n, key)([position % n])[0] == slow(n, key, position % n)


@given(n=st.integers(1, 500), data=st.data())
@settings(max_examples=50, deadline=None)
def test_any_slice_alone_is_the_slice_of_the_whole(n: int, data: st.DataObject) -> None:
    lo = data.draw(st.integers(0, n))
    hi = data.draw(st.integers(lo, n))
    permutation = KeyedPermutation(n, (7,))
    assert np.array_equal(permutation(np.arange(lo, hi)), permutation(np.arange(n))[lo:hi])


@pytest.mark.parametrize("n", [3, 5, 6, 8, 17])
def test_every_value_is_equally_likely_in_every_place(n: int) -> None:
    keys = 2000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), KeyedPermutation(n, (11, key))(np.arange(n))] += 1
    expected = keys / n
    chi2 = ((counts - expected) ** 2 / expected).sum() * (n - 1) / n
    degrees = (n - 1) ** 2
    assert abs(chi2 - degrees) < 5 * np.sqrt(2 * degrees) + 5  # five sigma


def test_neighbours_and_epochs_are_unrelated() -> None:
    n = 20_000
    first, second = (KeyedPermutation(n, (0, epoch))(np.arange(n)) for epoch in (0, 1))
    for a, b in ((first[:-1], first[1:]), (first, second), (np.arange(n), first)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)
    assert (first == second).sum() < 12  # one is expected
    assert (np.diff(first) == 1).sum() < 12


def test_key_parts_keep_their_places() -> None:
    n = 1000
    orders = {
        tuple(KeyedPermutation(n, key)(np.arange(n)))
        for key in ((1, 2), (2, 1), (1,), (2,), (2**32, 1), (1, 2**32), (0, 1), (0, 0))
    }
    assert len(orders) == 8


def test_a_huge_permutation_needs_no_list() -> None:
    tracemalloc.start()
    permutation = KeyedPermutation(2**61 + 5, (0,))
    values = permutation(np.arange(1000) + 2**60)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(np.unique(values)) == 1000
    assert values.max() < 2**61 + 5
    assert peak_bytes < 1_000_000


def test_shape_is_kept_and_empty_is_fine() -> None:
    permutation = KeyedPermutation(10, (0,))
    assert permutation(np.zeros((2, 3), int)).shape == (2, 3)
    assert permutation([]).shape == (0,)
    assert len(permutation) == 10


@pytest.mark.parametrize("n", [0, -1, 2**62 + 1])
def test_a_wrong_size_is_refused(n: int) -> None:
    with pytest.raises(ConfigError, match=str(n)):
        KeyedPermutation(n, (0,))


@pytest.mark.parametrize("key", [(), (-1,), (0, -3)])
def test_a_wrong_key_is_refused(key: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="non-negative"):
        KeyedPermutation(5, key)


@pytest.mark.parametrize("positions", [[-1], [5], [0, 7]])
def test_a_position_outside_is_refused(positions: list[int]) -> None:
    with pytest.raises(ConfigError, match="outside"):
        KeyedPermutation(5, (0,))(positions)
