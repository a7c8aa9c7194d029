"""The plan: no row dropped or repeated, whatever the workers; any cursor resumes it."""

from __future__ import annotations

import pickle
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypipe.errors import ConfigError
from raypipe.stream import Cursor, KeyedPermutation, StreamPlan, deal, split_micro

rows_of = st.lists(st.integers(0, 10**12), min_size=1, max_size=80, unique=True)


@given(rows=rows_of, step=st.integers(1, 30), world=st.integers(1, 9), seed=st.integers(0, 2**64))
@settings(max_examples=80, deadline=None)
def test_each_epoch_holds_each_row_once_over_all_ranks(
    rows: list[int], step: int, world: int, seed: int
) -> None:
    plan = StreamPlan(np.array(rows), seed, step, 2)
    seen: dict[int, list[int]] = {0: [], 1: []}
    for rank in range(world):
        for part in plan.slices(rank, world):
            seen[part.epoch].extend(part.rows)
    assert sorted(seen[0]) == sorted(seen[1]) == sorted(rows)


@given(n=st.integers(1, 60), step=st.integers(1, 20), world=st.integers(1, 7), data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_cursor_resumes_with_any_number_of_workers(
    n: int, step: int, world: int, data: st.DataObject
) -> None:
    plan = StreamPlan(np.arange(n), 4, step, 3)
    alone = list(plan.slices(0, 1))
    done = data.draw(st.integers(0, len(alone)))
    start = alone[done].cursor if done < len(alone) else plan.end
    ranks = [list(plan.slices(rank, world, start)) for rank in range(world)]
    assert {len(parts) for parts in ranks} == {len(alone) - done}
    for whole, *parts in zip(alone[done:], *ranks, strict=True):
        assert np.array_equal(whole.rows, np.concatenate([part.rows for part in parts]))
        assert np.array_equal(whole.rows, plan.step_rows(whole.epoch, whole.step))
        assert {part.cursor for part in parts} == {whole.cursor}
        assert {part.global_rows for part in parts} == {len(whole.rows)}


def test_a_rank_of_a_thousand_computes_its_own_places_only(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    compute = KeyedPermutation.__call__

    def counted(self: KeyedPermutation, positions: np.ndarray) -> np.ndarray:
        computed.append(np.size(positions))
        return compute(self, positions)

    monkeypatch.setattr(KeyedPermutation, "__call__", counted)
    slices = StreamPlan(range(10**9), 0, 16_000, 1).slices(7, 1000)
    got = [next(slices) for _ in range(300)]
    assert {len(part.rows) for part in got} == {16}
    assert sum(computed) <= 300 * 16 + 4096


def test_the_remainder_is_a_step_of_its_own() -> None:
    plan = StreamPlan(np.arange(10), 0, 4, 1)
    assert [part.global_rows for part in plan.slices(0, 1)] == [4, 4, 2]
    assert plan.steps_per_epoch == 3
    assert [plan.step_size(step) for step in range(3)] == [4, 4, 2]


def test_epochs_and_seeds_differ_and_list_order_does_not_matter() -> None:
    rows = np.arange(100) * 3
    plan = StreamPlan(rows, 0, 100, 2)
    assert not np.array_equal(plan.step_rows(0, 0), plan.step_rows(1, 0))
    assert not np.array_equal(plan.step_rows(0, 0), StreamPlan(rows, 1, 100, 2).step_rows(0, 0))
    backwards = StreamPlan(rows[::-1], 0, 100, 2)
    assert np.array_equal(plan.step_rows(0, 0), backwards.step_rows(0, 0))
    assert plan.rows_digest == backwards.rows_digest != StreamPlan(rows[1:], 0, 9, 1).rows_digest


@given(n=st.integers(0, 1000), world=st.integers(1, 50))
def test_deal_covers_evenly_in_order(n: int, world: int) -> None:
    pieces = [deal(n, rank, world) for rank in range(world)]
    assert [i for piece in pieces for i in range(n)[piece]] == list(range(n))
    sizes = [piece.stop - piece.start for piece in pieces]
    assert max(sizes) - min(sizes) <= 1


@given(n=st.integers(0, 300), parts=st.integers(1, 40))
def test_split_micro_has_no_empty_piece(n: int, parts: int) -> None:
    pieces = split_micro(n, parts)
    assert len(pieces) == min(n, parts)
    assert [i for piece in pieces for i in range(n)[piece]] == list(range(n))
    assert all(piece.stop > piece.start for piece in pieces)


def test_cursor_advances_and_orders() -> None:
    assert Cursor(0, 1).advance(3) == Cursor(0, 2)
    assert Cursor(0, 2).advance(3) == Cursor(1, 0)
    assert Cursor(0, 9) < Cursor(1, 0)
    with pytest.raises(ConfigError):
        Cursor(0, -1)


def test_a_pickled_plan_is_the_same_plan() -> None:
    plan = StreamPlan(np.arange(50), 3, 8, 2)
    assert plan.rows_digest
    copy = pickle.loads(pickle.dumps(plan))
    pairs = zip(plan.slices(1, 3), copy.slices(1, 3), strict=True)
    assert all(np.array_equal(a.rows, b.rows) for a, b in pairs)


def test_the_plan_keeps_its_own_rows() -> None:
    rows = np.arange(10)
    plan = StreamPlan(rows, 0, 4, 1)
    before = plan.step_rows(0, 0).copy()
    rows[:] = 0
    assert np.array_equal(plan.step_rows(0, 0), before)
    with pytest.raises(ValueError, match="read-only"):
        plan.rows[0] = 1


def test_an_endless_plan_is_lazy() -> None:
    plan = StreamPlan(np.arange(10), 0, 1, 10**9)
    assert len(list(islice(plan.slices(0, 1), 25))) == 25


@pytest.mark.parametrize(
    ("rows", "options", "says"),
    [
        ([], {}, "at least one valid row"),
        ([1, 1], {}, "1 repeated"),
        ([-1, 2], {}, "smallest -1"),
        ([0.5], {}, "float64"),
        ([[1, 2]], {}, "1-D"),
        ([1], {"rows_per_step": 0}, "rows_per_step=0"),
        ([1], {"epochs": 0}, "epochs=0"),
        ([1], {"seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments_are_refused(rows: list[int], options: dict[str, int], says: str) -> None:
    arguments = {"seed": 0, "rows_per_step": 1, "epochs": 1} | options
    with pytest.raises(ConfigError, match=says):
        StreamPlan(np.array(rows), **arguments)


def test_places_outside_the_plan_are_refused() -> None:
    plan = StreamPlan(np.arange(4), 0, 2, 1)
    with pytest.raises(ConfigError, match="outside the plan"):
        plan.step_rows(0, 2)
    with pytest.raises(ConfigError, match="outside the plan"):
        plan.slices(0, 1, Cursor(0, 2))
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        plan.slices(2, 2)
    assert list(plan.slices(0, 1, plan.end)) == []
