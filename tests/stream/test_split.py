"""Rows held out without a list: the parts are exact, even, ascending, and take no memory."""

from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from raypipe.errors import ConfigError
from raypipe.stream import KeyedPermutation, SplitRows, StreamPlan, split_rows
from raypipe.stream.rows import rows_digest, runs_of

HUGE = 10**9

sizes = st.integers(2, 400).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1)))


@given(given_=sizes, seed=st.integers(0, 2**70))
@settings(max_examples=150, deadline=None)
def test_the_parts_hold_each_row_once_in_ascending_order(
    given_: tuple[int, int], seed: int
) -> None:
    n, n_held = given_
    left, held = split_rows(n, n_held, seed)
    assert (len(left), len(held), left.size) == (n - n_held, n_held, n - n_held)
    both = [part[:].tolist() for part in (left, held)]
    assert sorted(both[0] + both[1]) == list(range(n))
    assert all(part == sorted(part) for part in both)


@given(given_=sizes, seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_the_smaller_part_has_one_row_of_each_stretch(given_: tuple[int, int], seed: int) -> None:
    n, n_held = given_
    smaller = min(split_rows(n, n_held, seed), key=len)[:].tolist()
    v = len(smaller)
    for j in range(v):
        inside = [row for row in smaller if j * n // v <= row < (j + 1) * n // v]
        assert len(inside) == 1


@given(given_=sizes, seed=st.integers(0, 9), data=st.data())
@settings(max_examples=80, deadline=None)
def test_any_place_alone_is_what_all_of_them_are(
    given_: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    for part in split_rows(*given_, seed):
        whole = part[:]
        places = np.array(data.draw(st.lists(st.integers(0, len(part) - 1), max_size=20)), int)
        assert whole.dtype == part[places].dtype == np.int64
        np.testing.assert_array_equal(part[places], whole[places])
        assert [part[int(p)] for p in places] == whole[places].tolist()
        assert (part[-1], part[len(part) - 1]) == (whole[-1], whole[-1])
        np.testing.assert_array_equal(part[3:50:4], whole[3:50:4])
        np.testing.assert_array_equal(np.asarray(part), whole)
        with pytest.raises(IndexError):
            part[np.array([len(part)])]


@pytest.mark.parametrize("n", [10**9, 4 * 10**9, 2**62])
def test_places_of_a_great_many_rows_are_found_exactly(n: int) -> None:
    """Beside the same stretches in Python's own integers."""
    n_held = max(1, min(n // 10, 2**63 // n - 1))
    left, held = split_rows(n, n_held, 5)
    rng = np.random.default_rng(0)
    for j in [0, n_held - 1, *rng.integers(0, n_held, 50).tolist()]:
        first, end = j * n // n_held, (j + 1) * n // n_held
        assert first <= held[j] < end
        among = [place for place in (first - j, end - j - 2) if place >= 0]
        rows = [left[place] for place in among]
        assert all(first <= row < end and row != held[j] for row in rows)
        assert held[j] == end - 1 or left[held[j] - j] == held[j] + 1
        assert held[j] == first or left[held[j] - j - 1] == held[j] - 1


def test_every_row_of_a_stretch_is_held_out_as_often() -> None:
    n, n_held, seeds = 100, 8, 3000
    counts = np.zeros(n)
    for seed in range(seeds):
        counts[split_rows(n, n_held, seed)[1][:]] += 1
    cuts = [j * n // n_held for j in range(n_held + 1)]
    sizes = np.diff(cuts)
    assert set(sizes.tolist()) == {12, 13}
    assert chisquare(counts, np.repeat(seeds / sizes, sizes)).pvalue > 1e-4


def test_stretches_and_seeds_draw_alone() -> None:
    n_held, width = 40_000, 12
    drawn = [split_rows(width * n_held, n_held, seed)[1][:] % width for seed in (0, 1)]
    pairs = [(drawn[0][1:], drawn[0][:-1]), (drawn[0], drawn[1])]
    for one, other in pairs:  # of 144 pairs each comes as often
        assert chisquare(np.bincount(one * width + other, minlength=width**2)).pvalue > 1e-4


def test_the_digest_tells_parts_and_seeds_apart() -> None:
    parts = [part for seed in (0, 1) for n in (50, 51) for part in split_rows(n, 7, seed)]
    assert len({rows_digest(part) for part in parts}) == len(parts)
    again = pickle.loads(pickle.dumps(parts[0]))
    assert again == parts[0] and rows_digest(again) == rows_digest(parts[0])


@pytest.mark.parametrize("window", [0, 4096])
def test_a_billion_rows_are_split_planned_and_known_in_no_memory(window: int) -> None:
    tracemalloc.start()
    left, held = split_rows(HUGE, HUGE // 10, 3)
    plan = StreamPlan(left, 0, 256, 3, window)
    rows = plan.step_rows(2, plan.steps_per_epoch - 2)
    part = next(plan.slices(999, 1000))
    assert len(plan.rows_digest) == 64 and plan.rows[-1] >= HUGE - 2
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert part.global_rows == 256 and rows.size == len(np.unique(rows)) == 256
    assert peak_bytes < 2 << 20  # 4096 steps of this rank at once, whatever the rows
    assert len(pickle.dumps(plan)) < 1000 and len(pickle.dumps(held)) < 500
    assert not any(isinstance(value, np.ndarray) for value in vars(left).values())


def test_numpys_numbers_are_the_same_split() -> None:
    n, n_held, seed = 3 * 10**9, 10**9, 5  # their product is above 2**32, and below 2**63
    given_ = np.int64(n), np.int64(n_held), np.int64(seed)
    places = np.array([0, 1, n_held - 1])
    for part, same in zip(split_rows(*given_), split_rows(n, n_held, seed), strict=True):
        assert {type(value) for value in vars(part).values()} <= {int, bool}
        assert part == same and rows_digest(part) == rows_digest(same)
        np.testing.assert_array_equal(part[places], same[places])
    small = split_rows(np.int8(100), np.uint8(80), np.int8(1))
    assert small == split_rows(100, 80, 1)
    with pytest.raises(ConfigError, match=r"2\*\*63"):
        split_rows(np.int64(2**40), np.int64(2**30), np.int64(0))


def test_a_plan_of_a_part_is_the_plan_of_its_list() -> None:
    left, _ = split_rows(103, 20, 4)
    for window in (0, 32):
        plan, listed = (StreamPlan(rows, 1, 7, 2, window) for rows in (left, left[:]))
        assert isinstance(plan.rows, SplitRows)
        for a, b in zip(plan.slices(1, 3), listed.slices(1, 3), strict=True):
            np.testing.assert_array_equal(a.rows, b.rows)


def test_a_window_of_a_part_lies_in_as_few_pieces_of_the_file() -> None:
    """Which a part of a permutation would scatter over all of it."""
    n, window = 100_000, 1600
    left, _ = split_rows(n, n // 10, 0)
    rows = StreamPlan(left, 0, 16, 1, window).span(0, 3 * window, 4 * window)
    touched = np.unique(rows // 10)  # neighbours of ten, a page or so
    assert len(runs_of(touched)) <= 18
    scattered = KeyedPermutation(n, (0,))(np.arange(window)) // 10
    assert len(runs_of(np.unique(scattered))) > 1000


def test_what_is_no_split_is_refused() -> None:
    for n, n_held in ((1, 1), (5, 0), (5, 5), (5, 6)):
        with pytest.raises(ConfigError, match="at least one"):
            split_rows(n, n_held, 0)
    with pytest.raises(ConfigError, match="non-negative"):
        split_rows(5, 2, -1)
    with pytest.raises(ConfigError, match=r"2\*\*63"):
        split_rows(2**40, 2**30, 0)
    with pytest.raises(ConfigError, match="half"):
        SplitRows(size=4, n=6, seed=0, drawn=True)
