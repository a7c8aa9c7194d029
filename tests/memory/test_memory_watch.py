"""The watch with injected readings. Its kill, with real processes, is test_memory_watch_real's."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypipe.memory.ending import raise_priority
from raypipe.memory.policy import Limits
from raypipe.memory.probe import ProcessProbe, Reading
from raypipe.memory.registration import Registration
from raypipe.memory.slot import Slot
from raypipe.memory.statm import PAGE_BYTES
from raypipe.memory.verdict import Verdict, find
from raypipe.memory.watch import Watch
from raypipe.memory.watched import FASTEST_BYTES_PER_S, LONGEST_TICKS

GIB = 1024**3
BUDGET = 8 * GIB
LIMITS = Limits.of(BUDGET)


class ScriptedProbe(ProcessProbe):
    """Reads what it is told; None: the process has ended."""

    now: Reading | None = Reading(0, 0)

    reads = 0

    def read(self) -> Reading:
        self.reads += 1
        if self.now is None:
            raise ProcessLookupError
        return self.now

    def anon_pages(self) -> int:
        return self.read().anon_bytes // PAGE_BYTES


class Desk:
    """A watch over this process, with numbers instead of memory; kills are only counted."""

    def __init__(self, folder: Path) -> None:
        self.killed: list[int] = []
        self.gone: list[Registration] = []
        self.verdicts: list[Verdict] = []
        self.probe = ScriptedProbe(os.getpid())
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.slot = Slot.create(folder / "slot")
        self.registration = Registration(
            pid=os.getpid(),
            start_ticks=self.probe.start_ticks,
            budget_bytes=BUDGET,
            label="me",
            slot_path=folder / "slot",
            verdict_dir=folder / "memory",
        )
        self.watch = Watch(
            kill=self.killed.append,
            on_gone=self.gone.append,
            on_verdict=self.verdicts.append,
            probe=lambda pid: self.probe,
        )

    def see(self, anon_bytes: int, file_bytes: int = 0) -> int:
        self.probe.now = Reading(anon_bytes, file_bytes)
        return self.watch.tick(LONGEST_TICKS)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    made.watch.register(made.registration)
    yield made
    made.watch.stop()


def test_pressure_comes_and_goes_with_hysteresis(desk: Desk) -> None:
    told = []
    for usage in (0, LIMITS.soft_bytes - 1, LIMITS.soft_bytes, LIMITS.resume_bytes, GIB):
        desk.see(usage)
        told.append(desk.slot.pressure)
    assert told == [False, False, True, True, False]
    assert desk.killed == []


def test_file_pages_are_never_charged_and_pinned_ones_are(desk: Desk) -> None:
    desk.see(GIB, 4 * BUDGET)
    assert not desk.slot.pressure
    desk.slot.pinned_bytes = LIMITS.soft_bytes
    time.sleep(0.11)
    desk.see(GIB)
    assert desk.slot.pressure


@given(
    st.lists(st.integers(LIMITS.resume_bytes - GIB, LIMITS.hard_bytes + GIB), min_size=1),
    st.sampled_from([0, 512 << 20]),
)
def test_the_cheap_look_decides_as_the_whole_one(usages: list[int], pinned_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        desks = [Desk(Path(folder) / name) for name in ("cheap", "whole")]
        for desk in desks:
            desk.watch.register(desk.registration)
            desk.slot.pinned_bytes = pinned_bytes
        for usage in usages:
            for desk in desks:
                desk.see(usage - pinned_bytes)
            (one,) = desks[1].watch._watched.values()
            one.quiet_below = 0
            assert desks[0].slot.pressure == desks[1].slot.pressure
            assert len(desks[0].killed) == len(desks[1].killed)
        for desk in desks:
            desk.watch.stop()


def test_at_the_hard_limit_it_kills_once_and_writes_why(desk: Desk, tmp_path: Path) -> None:
    desk.slot.batch = 64
    desk.see(LIMITS.soft_bytes)
    desk.slot.batch = 16
    desk.slot.reliefs = 2
    desk.see(LIMITS.hard_bytes, GIB)
    desk.see(LIMITS.hard_bytes + GIB)
    desk.watch.flush()
    assert len(desk.killed) == 1
    (verdict,) = desk.verdicts
    me = desk.registration
    assert find(tmp_path / "memory", me.pid, me.start_ticks) == verdict
    assert (verdict.usage_bytes, verdict.budget_bytes) == (LIMITS.hard_bytes, BUDGET)
    assert (verdict.batch, verdict.file_bytes, verdict.label) == (16, GIB, "me")
    assert "told 0.0 s before" in verdict.tried[0]
    assert verdict.tried[1:] == ("batch 64 -> 16", "caches emptied 2 time(s)")
    assert desk.slot.sentence is not None
    assert desk.slot.sentence.anon_bytes == LIMITS.hard_bytes


def test_a_verdict_that_cannot_be_written_is_said_and_kept(
    desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "memory").write_text("a file where the folder should be")
    desk.see(LIMITS.hard_bytes)
    desk.watch.flush()
    assert len(desk.killed) == len(desk.verdicts) == 1
    assert "this verdict is only here: me (process" in capsys.readouterr().err


def test_the_dead_are_let_go_once(desk: Desk) -> None:
    desk.probe.now = None
    for _ in range(3):
        desk.watch.tick(LONGEST_TICKS)
    assert desk.gone == [desk.registration]
    assert desk.watch.registrations == ()


def test_a_later_process_of_that_number_is_not_taken_for_it(desk: Desk) -> None:
    desk.watch.unregister(os.getpid())
    other = replace(desk.registration, start_ticks=desk.registration.start_ticks + 1)
    with pytest.raises(ProcessLookupError, match="it is another one"):
        desk.watch.register(other)
    assert desk.watch.registrations == ()


def test_it_looks_the_more_often_the_nearer_the_limit_is(desk: Desk) -> None:
    """Nobody gets from one look past the limit before the next, with all cores."""
    assert desk.see(0) == LONGEST_TICKS
    assert desk.see(LIMITS.hard_bytes - 1) == 1
    for headroom in range(1, LIMITS.hard_bytes, 97 * 1024**2):
        ticks = desk.see(LIMITS.hard_bytes - headroom)
        assert ticks == 1 or headroom >= ticks * desk.watch.poll_s * FASTEST_BYTES_PER_S
    desk.see(LIMITS.hard_bytes - GIB // 16)
    before = desk.probe.reads
    for _ in range(5):
        desk.watch.tick()
    assert desk.probe.reads == before + 5, "near it, at every tick"


def test_a_priority_that_cannot_be_raised_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    monkeypatch.setattr(os, "setpriority", refuse)
    assert raise_priority().startswith("ordinary priority, nice ")
    assert "CAP_SYS_NICE" in raise_priority()


def test_pressure_that_a_watch_before_left_behind_is_taken_back(desk: Desk) -> None:
    desk.watch.unregister(os.getpid())
    desk.slot.pressure = True
    desk.probe = ScriptedProbe(os.getpid())
    desk.watch.register(desk.registration)
    desk.see(LIMITS.resume_bytes)
    assert desk.slot.pressure, "not yet below where it ends"
    desk.see(GIB)
    assert not desk.slot.pressure
