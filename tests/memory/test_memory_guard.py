"""A process's own guard, and what every process has of them."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest

from raypipe.errors import ConfigError, MemoryBudgetExceeded
from raypipe.memory import guard as guard_module
from raypipe.memory import resolve
from raypipe.memory.attend import attend
from raypipe.memory.guard import (
    InProcessGuard,
    NoGuard,
    current,
    guarding,
    note,
    on_relief,
    relieve,
)
from raypipe.memory.history import read_history
from raypipe.memory.policy import Limits
from raypipe.memory.probe import Charge, charge_bytes
from raypipe.memory.tracker import PHASE_ROW_S

GIB = 1024**3
LIMITS = Limits.of(8 * GIB)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the process is charged for, reading by reading; the last one stays."""
    readings = [0]

    def charge() -> Charge:
        return Charge(readings.pop(0) if len(readings) > 1 else readings[0], 0, 0, 7 * GIB)

    monkeypatch.setattr(guard_module, "charge", charge)
    return readings


def test_it_tells_with_hysteresis(held: list[int]) -> None:
    guard = InProcessGuard(8 * GIB, "worker")
    held[:] = [GIB, LIMITS.soft_bytes, LIMITS.resume_bytes, GIB]
    assert [guard.pressure() for _ in range(4)] == [False, True, True, False]


def test_above_the_hard_limit_it_empties_caches_then_ends(held: list[int]) -> None:
    guard = InProcessGuard(8 * GIB, "worker")
    guard.note(batch=4, phase="fit")
    held[:] = [LIMITS.hard_bytes, LIMITS.soft_bytes]
    assert guard.pressure(), "emptying helped"
    held[:] = [LIMITS.hard_bytes]
    with pytest.raises(MemoryBudgetExceeded) as caught:
        guard.pressure()
    text = str(caught.value)
    assert caught.value.exit_code == 3
    assert "\n" not in text
    for part in ("worker in fit at batch 4", "7.60 GiB of its budget of 8.00 GiB", "smaller batch"):
        assert part in text


def test_a_budget_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ConfigError):
        InProcessGuard(GIB // 4, "worker")


def test_one_guard_holds_for_a_block() -> None:
    assert isinstance(current(), NoGuard)
    assert current().budget_bytes is None
    assert not current().pressure()
    with guarding(InProcessGuard(64 * GIB, "me")) as guard:
        assert current() is guard
        assert not current().pressure()
        with guarding(NoGuard()) as inner:
            assert current() is inner
        assert current() is guard
    assert isinstance(current(), NoGuard)


class Counting(NoGuard):
    reliefs = 0

    def count_relief(self) -> None:
        self.reliefs += 1


def test_relieve_gives_memory_back_and_says_so() -> None:
    counting = Counting()
    many = [bytes(1000) for _ in range(300_000)]
    many[0:-1:2] = [b""] * len(many[0:-1:2])  # holes below the top of the heap
    full = charge_bytes()
    del many
    with guarding(counting):
        relieve()
    assert charge_bytes() < full - 200 * 1024**2 // 2
    assert counting.reliefs == 1


class Map:
    """Holds pages that can be had again."""

    given_back = 0

    def give_back(self) -> None:
        self.given_back += 1


def test_relieve_asks_those_who_hold_pages_while_they_are_there() -> None:
    held, gone = Map(), Map()
    on_relief(held)
    on_relief(gone)
    del gone
    gc.collect()
    relieve()
    assert held.given_back == 1


def test_what_is_noted_goes_to_the_guard_and_to_the_log() -> None:
    class Heard(NoGuard):
        def __init__(self) -> None:
            self.told: list[tuple[int | None, str | None]] = []

        def note(self, *, batch: int | None = None, phase: str | None = None) -> None:
            self.told.append((batch, phase))

    class Written:
        def __init__(self) -> None:
            self.told: list[tuple[int | None, str | None]] = []

        def update(self, step: int | None = None, phase: str | None = None) -> None:
            self.told.append((step, phase))

    note(step=1, phase="nobody listens")
    heard, written = Heard(), Written()
    with guarding(heard, written):
        note(step=3, batch=8, phase="train")
        note(step=4)
        with guarding(NoGuard()):
            note(step=5)
    note(step=6)
    assert heard.told == [(8, "train")], "a step alone is of no use to a verdict"
    assert written.told == [(3, "train"), (4, None), (5, None)]


def test_an_attended_process_has_steps_and_phases_in_its_log(tmp_path: Path) -> None:
    memory = resolve()
    with attend(memory, tmp_path, "me", NoGuard()):
        for step, phase in enumerate(("load", "train", "save")):
            note(step=step, phase=phase)
            time.sleep(2 * PHASE_ROW_S)
    found = read_history(tmp_path / "memory" / "me.csv")
    assert [phase for phase in dict.fromkeys(found.phase) if phase] == ["load", "train", "save"]
    assert found.step[-1] == 2
