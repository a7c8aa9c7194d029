"""Rows as a range: the same plan and digest as the array, and no memory for them."""

from __future__ import annotations

import hashlib
import pickle
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypipe.errors import ConfigError
from raypipe.stream import RowRange, StreamPlan, split_rows
from raypipe.stream.rows import runs_of

ranges = st.builds(
    lambda start, n, step, back: range(start, start + n * step, step)[:: -1 if back else 1],
    st.integers(0, 10**6),
    st.integers(1, 70),
    st.integers(1, 1000),
    st.booleans(),
)


@given(rows=ranges, step=st.integers(1, 20), window=st.integers(0, 80))
@settings(max_examples=80, deadline=None)
def test_a_range_makes_the_plan_of_its_array(rows: range, step: int, window: int) -> None:
    plan = StreamPlan(rows, 1, step, 2, window)
    same = StreamPlan(np.array(rows), 1, step, 2, window)
    assert isinstance(plan.rows, RowRange)
    assert plan.rows_digest == same.rows_digest
    assert plan.rows_digest == hashlib.sha256(np.array(sorted(rows), "<i8").tobytes()).hexdigest()
    for a, b in zip(plan.slices(0, 1), same.slices(0, 1), strict=True):
        assert np.array_equal(a.rows, b.rows)
        assert a.rows.dtype == np.int64
    assert np.array_equal(np.asarray(plan.rows), same.rows)
    assert (plan.rows[0], plan.rows[-1], len(plan.rows)) == (min(rows), max(rows), len(rows))


def test_a_digest_over_several_chunks_is_the_arrays() -> None:
    n = (1 << 17) + 5
    expected = hashlib.sha256(np.arange(7, 7 + n).tobytes()).hexdigest()
    assert StreamPlan(range(7, 7 + n), 0, 1, 1).rows_digest == expected
    assert StreamPlan(np.arange(7, 7 + n), 0, 1, 1).rows_digest == expected


@pytest.mark.parametrize("window", [0, 4096])
def test_a_plan_of_ten_million_rows_holds_nothing_of_their_size(window: int) -> None:
    tracemalloc.start()
    plan = StreamPlan(range(10_000_000), 0, 256, 3, window)
    rows = plan.step_rows(2, plan.steps_per_epoch - 2)
    assert len(plan.rows_digest) == 64
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows.size == len(np.unique(rows)) == 256
    assert peak_bytes < 4_000_000
    assert len(pickle.dumps(plan)) < 2000


def test_ranges_that_are_no_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one valid row"):
        StreamPlan(range(0), 0, 1, 1)
    with pytest.raises(ConfigError, match="count from 0"):
        StreamPlan(range(-1, 4), 0, 1, 1)
    with pytest.raises(IndexError):
        RowRange.of(range(4))[np.array([4])]


@pytest.mark.parametrize(
    "places", [np.array([True, False, True]), np.array([0.0, 1.0]), np.array(True)]
)
def test_places_that_are_no_whole_numbers_are_refused(places: np.ndarray) -> None:
    """A mask would be taken for the places 0 and 1."""
    for rows in (RowRange.of(range(5, 8)), split_rows(10, 3, 0)[1]):
        with pytest.raises(IndexError, match="whole numbers"):
            rows[places]
    np.testing.assert_array_equal(RowRange.of(range(5, 8))[np.array([0, 2], np.uint8)], [5, 7])


@given(rows=st.lists(st.integers(0, 60), max_size=40))
def test_runs_cover_the_rows_and_nothing_else(rows: list[int]) -> None:
    runs = runs_of(np.sort(np.array(rows, dtype=np.int64)))
    assert [i for lo, hi in runs for i in range(lo, hi)] == sorted(set(rows))
    assert all(a[1] < b[0] for a, b in pairwise(runs))
