"""The window shuffle: a bijection for any size, local in the file, and how far from global."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypipe.errors import ConfigError
from raypipe.stream import Cursor, KeyedPermutation, StreamPlan, WindowShuffle, shuffle_quality
from raypipe.stream.rows import runs_of
from raypipe.stream.window import BLOCKS


def slow(n: int, window: int, key: tuple[int, ...]) -> list[int]:
    """The same order as lists: cut, shuffle the blocks, join, shuffle inside windows."""
    if window >= n:
        return KeyedPermutation(n, (*key, 0))(np.arange(n)).tolist()
    size = max(1, window // BLOCKS)
    blocks = [list(range(lo, min(lo + size, n))) for lo in range(0, n, size)]
    tail = blocks.pop() if n % size else None
    order = KeyedPermutation(len(blocks), (*key, 2))(np.arange(len(blocks)))
    blocks = [blocks[int(i)] for i in order]
    if tail is not None:
        blocks.insert(int(KeyedPermutation(len(blocks) + 1, (*key, 1))([0])[0]), tail)
    sequence = [row for block in blocks for row in block]
    mixed: list[int] = []
    for index, lo in enumerate(range(0, n, window)):
        part = sequence[lo : lo + window]
        inside = KeyedPermutation(len(part), (*key, 3, index))(np.arange(len(part)))
        mixed += [part[int(i)] for i in inside]
    return mixed


@given(n=st.integers(1, 400), window=st.integers(1, 500), seed=st.integers(0, 2**64))
@settings(max_examples=100, deadline=None)
def test_it_is_a_bijection_and_equals_the_slow_one(n: int, window: int, seed: int) -> None:
    values = WindowShuffle(n, window, (seed, 1))(np.arange(n))
    assert values.dtype == np.int64
    assert np.array_equal(np.sort(values), np.arange(n))
    assert values.tolist() == slow(n, window, (seed, 1))


@given(n=st.integers(1, 10**12), window=st.integers(1, 10**9), data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_part_is_computed_alone(n: int, window: int, data: st.DataObject) -> None:
    shuffle = WindowShuffle(n, window, (5,))
    at = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=8)), dtype=np.int64)
    values = shuffle(at)
    assert np.array_equal(values, np.array([int(shuffle([i])[0]) for i in at], dtype=np.int64))
    assert len(set(values.tolist())) == len(set(at.tolist()))
    assert all(0 <= value < n for value in values)


def test_a_window_lies_in_few_pieces_of_the_file() -> None:
    shuffle = WindowShuffle(100_003, 1600, (0, 0))
    pieces = [
        len(runs_of(np.sort(shuffle(np.arange(lo, min(lo + 1600, 100_003))))))
        for lo in range(0, 100_003, 1600)
    ]
    assert max(pieces) <= BLOCKS + 2  # the smaller last block and what it displaces


def test_its_quality_against_a_global_shuffle() -> None:
    n = 50_000
    near = shuffle_quality(KeyedPermutation(n, (0, 0))(np.arange(n)))
    assert near.displacement == pytest.approx(1, abs=0.02)
    assert abs(near.neighbour_correlation) < 0.02
    assert near.adjacent < 3e-4
    window = shuffle_quality(WindowShuffle(n, 1024, (0, 0))(np.arange(n)))
    assert window.displacement == pytest.approx(1, abs=0.2)  # few blocks: a wider spread
    # Two rows of a window are of one block once in BLOCKS times; other blocks tell nothing.
    assert window.neighbour_correlation == pytest.approx(1 / BLOCKS, abs=0.06)
    assert window.adjacent < 3 / 1024
    straight = shuffle_quality(np.arange(n))
    assert straight.displacement == 0
    assert straight.neighbour_correlation == pytest.approx(1)
    assert straight.adjacent == 1


def test_quality_of_tiny_orders_by_hand() -> None:
    found = shuffle_quality([2, 1, 0])
    assert found.displacement == pytest.approx((2 + 0 + 2) / 3 / (8 / 9))
    assert found.neighbour_correlation == pytest.approx(1)
    assert found.adjacent == 0
    for wrong in ([0, 1], [0, 0, 1], [[0, 1, 2]]):
        with pytest.raises(ConfigError, match="permutation"):
            shuffle_quality(wrong)


def test_epochs_differ_and_wrong_windows_are_refused() -> None:
    first, second = (WindowShuffle(500, 64, (0, epoch))(np.arange(500)) for epoch in (0, 1))
    assert not np.array_equal(first, second)
    with pytest.raises(ConfigError, match="window of 0"):
        WindowShuffle(5, 0, (0,))
    with pytest.raises(ConfigError, match="outside"):
        WindowShuffle(5, 2, (0,))([5])
    with pytest.raises(ConfigError, match="window=-1"):
        StreamPlan(range(4), 0, 1, 1, window=-1)


@given(
    n=st.integers(1, 90),
    step=st.integers(1, 20),
    worlds=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    window=st.integers(0, 100),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_a_plan_with_windows_resumes_anywhere(
    n: int, step: int, worlds: tuple[int, int], window: int, data: st.DataObject
) -> None:
    plan = StreamPlan(range(3, 3 + n), 4, step, 2, window)
    cut = Cursor(data.draw(st.integers(0, 1)), data.draw(st.integers(0, plan.steps_per_epoch - 1)))
    seen: dict[int, list[int]] = {0: [], 1: []}
    for rank in range(worlds[0]):
        for part in plan.slices(rank, worlds[0]):
            if part.cursor < cut:
                seen[part.epoch].extend(part.rows)
    for rank in range(worlds[1]):
        for part in plan.slices(rank, worlds[1], cut):
            seen[part.epoch].extend(part.rows)
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(3, 3 + n))
