"""Marks, hysteresis and the batch's way down, as pure functions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypipe.errors import ConfigError
from raypipe.memory.policy import APART_BYTES, MARGIN_BYTES, Limits, Throttle, decide

GIB = 1024**3
budgets = st.integers(2 * MARGIN_BYTES, 4096 * GIB)


@given(budgets)
def test_the_marks_are_in_order_and_leave_room(budget: int) -> None:
    limits = Limits.of(budget)
    assert 0 < limits.resume_bytes < limits.soft_bytes <= limits.hard_bytes - APART_BYTES
    assert limits.hard_bytes <= budget - MARGIN_BYTES
    assert limits.hard_bytes <= 0.95 * budget


@given(st.integers(int(1.6 * GIB), 4096 * GIB))
def test_from_1600_mib_on_the_marks_are_the_shares(budget: int) -> None:
    limits = Limits.of(budget)
    assert limits.soft_bytes == int(0.80 * budget)
    assert limits.resume_bytes == pytest.approx(0.70 * budget, abs=2)


def test_a_large_budget_stops_at_its_share_a_small_one_at_its_margin() -> None:
    assert Limits.of(16 * GIB).hard_bytes == int(0.95 * 16 * GIB)
    assert Limits.of(4 * GIB).hard_bytes == 4 * GIB - MARGIN_BYTES


@given(st.integers(-10, 2 * MARGIN_BYTES - 1))
def test_a_budget_that_cannot_be_kept_is_refused(budget: int) -> None:
    with pytest.raises(ConfigError, match="give --max-memory-per-process"):
        Limits.of(budget)


@given(st.integers(0, 10 * GIB), st.booleans())
def test_hysteresis(usage: int, pressed: bool) -> None:
    limits = Limits.of(8 * GIB)
    found = decide(usage, limits, pressed)
    assert found.kill == (usage >= limits.hard_bytes)
    if usage >= limits.soft_bytes:
        assert found.pressed
    elif usage < limits.resume_bytes:
        assert not found.pressed
    else:
        assert found.pressed == pressed


@given(st.integers(1, 4096), st.lists(st.booleans(), max_size=60))
def test_a_batch_never_grows_and_never_ends(full: int, pressures: list[bool]) -> None:
    throttle, before = Throttle(full), full
    for pressure in pressures:
        now = throttle.next(pressure)
        assert now == throttle.limit
        assert now == before if not pressure else max(1, before // 2) <= now <= before
        before = now


def test_a_batch_halves_at_once_then_at_every_third_boundary() -> None:
    throttle = Throttle(64)
    assert [throttle.next(True) for _ in range(7)] == [32, 32, 32, 16, 16, 16, 8]
    assert [throttle.next(p) for p in (False, True, True)] == [8, 4, 4]


def test_a_batch_of_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="below 1"):
        Throttle(0)
