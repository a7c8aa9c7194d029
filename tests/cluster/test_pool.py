"""The pool on real Ray actors: every item once, slow and dead workers, poison, late reports."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from rival import rival

from raypipe.cluster import pool as pool_module
from raypipe.cluster.budget import WorkerMemory
from raypipe.cluster.pool import RayPool
from raypipe.cluster.seat import Died, Seat
from raypipe.errors import NoSpace, WorkerFailed
from raypipe.memory.config import MemoryFlags, resolve
from raypipe.runner import Done, LocalPool, Needs
from raypipe.store import this_node

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

HALF = Needs(workers=2, cpus=0.5)


@dataclass(frozen=True)
class Item:
    key: int

    def again(self) -> Item:
        return self

    def with_less_memory(self) -> Item:
        return self

    def at_most(self, other: Item) -> Item:
        return self


@dataclass(frozen=True)
class Setup:
    """Makes a worker that writes its calls to ``log`` and misbehaves as told."""

    log: Path
    die_at: int = -1
    poison: int = -1
    refuse: int = -1
    slow_s: float = 0.0
    late: bool = False
    load_s: float = 0.0

    def __call__(self) -> Recorder:
        return Recorder(self)


class Recorder:
    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        time.sleep(setup.load_s)
        self.held: list[Done] = []
        self.shared: Any = None
        # The first worker to claim this is the slow one.
        self.is_slow = bool(setup.slow_s) and _claim(setup.log.with_suffix(".slow"))

    def describe(self) -> str:
        return "recorder"

    def open(self, shared: Any) -> int:
        self.shared = shared
        return os.getpid()

    def close(self) -> None:
        self.shared = None

    def step(self, item: Item, upcoming: Item | None) -> list[Done]:
        with self.setup.log.open("a") as file:
            file.write(f"{item.key} {os.getpid()} {self.shared}\n")
        if item.key == self.setup.poison or (
            item.key == self.setup.die_at and _claim(self.setup.log.with_suffix(".died"))
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        if item.key == self.setup.refuse:
            raise NoSpace("needs 10 bytes, 3 are free; make room")
        if self.is_slow:
            time.sleep(self.setup.slow_s)
        self.held.append(Done(item.key, item.key * 10))
        if self.setup.late:  # reports an item only when the next one has come
            ready, self.held = self.held[:-1], self.held[-1:]
        else:
            ready, self.held = self.held, []
        return ready

    def drain(self) -> list[Done]:
        ready, self.held = self.held, []
        return ready


def _claim(path: Path) -> bool:
    try:
        path.open("x").close()
    except FileExistsError:
        return False
    return True


def run(setup: Setup, n: int, needs: Needs = HALF) -> list[Done]:
    with RayPool(setup, needs, on_event=lambda text: None) as pool:
        assert pool.describe() == "recorder"
        return list(pool.run([Item(i) for i in range(n)], "shared"))


@pytest.mark.parametrize("late", [False, True])
def test_every_item_is_reported_once(tmp_path: Path, late: bool) -> None:
    done = run(Setup(tmp_path / "log", late=late), 20)
    assert sorted(d.key for d in done) == list(range(20))
    assert all(d.payload == d.key * 10 for d in done)
    assert {line.split()[2] for line in (tmp_path / "log").read_text().splitlines()} == {"shared"}


def test_a_slow_worker_does_not_hold_the_others(tmp_path: Path) -> None:
    done = run(Setup(tmp_path / "log", slow_s=1.0), 30)
    assert len(done) == 30
    by_pid: dict[str, int] = {}
    for line in (tmp_path / "log").read_text().splitlines():
        by_pid[line.split()[1]] = by_pid.get(line.split()[1], 0) + 1
    assert max(by_pid.values()) > 20


@pytest.mark.parametrize("late", [False, True])
def test_a_killed_workers_items_go_to_others(tmp_path: Path, late: bool) -> None:
    done = run(Setup(tmp_path / "log", die_at=4, late=late), 12)
    assert sorted(d.key for d in done) == list(range(12))


def test_the_driver_is_told_whom_to_shut_out(tmp_path: Path) -> None:
    lost: list[int] = []
    setup = Setup(tmp_path / "log", die_at=4)
    with RayPool(setup, HALF, on_event=lambda text: None) as pool:
        done = list(pool.run([Item(i) for i in range(12)], "shared", lost.append))
    assert len(done) == 12
    died = [
        line.split()[1]
        for line in (tmp_path / "log").read_text().splitlines()
        if line.startswith("4 ")
    ]
    assert lost == [int(died[0])]


def test_the_clock_of_a_replacement_starts_with_its_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long healthy run must not use up the time that a replacement has to load."""
    monkeypatch.setattr(pool_module, "SAY_WAITING_EVERY_S", 0.5)
    setup = Setup(tmp_path / "log", die_at=5, slow_s=1.0, load_s=2.0)
    with RayPool(setup, Needs(workers=1), on_event=lambda text: None, start_timeout_s=5.0) as pool:
        pool.describe()
        assert len(list(pool.run([Item(i) for i in range(7)], "shared"))) == 7


class TestOneThatWaitsForItsMemory:
    """Each pool's workers have numbers of their own from 1 on, and wait on the same node."""

    @pytest.fixture(autouse=True)
    def often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pool_module, "SAY_WAITING_EVERY_S", 1.0)

    def pool(
        self,
        run_dir: Path,
        budget: str,
        say: Callable[[str], None],
        workers: int = 1,
        slow_s: float = 0.0,
    ) -> RayPool:
        memory = resolve(MemoryFlags(max_memory_per_process=budget), environ={})
        order = WorkerMemory(memory=memory, per_node=workers, run_dir=run_dir)
        needs = Needs(workers=workers, cpus=0.2)
        return RayPool(Setup(run_dir / "log", slow_s=slow_s), needs, memory=order, on_event=say)

    def test_it_is_said_for_how_much_and_who_holds_it_of_the_right_run(
        self, tmp_path: Path
    ) -> None:
        said: list[str] = []

        def hear(text: str) -> None:
            said.append(text)
            if "has waited" in text:
                give_back()

        for name in ("first", "second"):
            (tmp_path / name).mkdir()
        with (
            rival(tmp_path / "theirs") as (held, give_back),
            self.pool(tmp_path / "first", "1000MiB", print) as first,
            self.pool(tmp_path / "second", "600MiB", hear) as second,
        ):
            assert second.describe() == first.describe() == "recorder"
        wait = next(text for text in said if "has waited" in text)
        mine = second._name
        assert mine != first._name
        assert re.match(
            rf"waiting for a worker to load; the cluster has .*; {mine}-1 on node {this_node()} has "
            rf"waited \d s for its memory there: 600 MiB are asked for, .*{held}; ends after 600 s$",
            wait,
        ), said

    def test_one_of_two_is_named_while_the_other_works(self, tmp_path: Path) -> None:
        said: list[str] = []
        room = {"n_bytes": 600 << 20, "capacity_bytes": 1800 << 20}
        with (
            rival(tmp_path / "theirs", **room),
            self.pool(tmp_path, "800MiB", said.append, workers=2, slow_s=0.5) as pool,
        ):
            assert len(list(pool.run([Item(i) for i in range(8)], "shared"))) == 8
            (late,) = [seat.name for seat in pool._seats if not seat.pid]
        waits = [text for text in said if "has waited" in text]
        assert waits and all(text.startswith(f"{late} on node {this_node()}") for text in waits)
        assert re.search(
            r"; held by .*another-worker \(\d+\) 600 MiB of .*/theirs.*; ends", waits[0]
        )


class Short(Exception):
    """What an item raises when it cannot take less memory."""


@dataclass(frozen=True)
class Shrinking:
    key: int
    size: int = 4

    def again(self) -> Shrinking:
        return self

    def with_less_memory(self) -> Shrinking:
        if self.size == 1:
            raise Short
        return Shrinking(self.key, self.size // 2)

    def at_most(self, other: Shrinking) -> Shrinking:
        return Shrinking(self.key, min(self.size, other.size))


def test_rays_memory_kill_asks_for_less_until_there_is_no_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's monitor kills by an error of its own, which is not an actor's death."""
    sizes: list[int] = []
    result = Seat.result

    def killed(self: Seat, ref: Any) -> Any:
        if self.call == ref and isinstance(self.current, Shrinking):
            sizes.append(self.current.size)
            raise Died("the node is short of memory", out_of_memory=True)
        return result(self, ref)

    monkeypatch.setattr(Seat, "result", killed)
    with (
        RayPool(Setup(tmp_path / "log"), Needs(workers=1), on_event=lambda text: None) as pool,
        pytest.raises(Short),
    ):
        list(pool.run([Shrinking(0)], "shared"))
    assert sizes == [4, 2, 1]


def test_the_only_worker_is_replaced_and_opened_again(tmp_path: Path) -> None:
    done = run(Setup(tmp_path / "log", die_at=2, late=True), 5, Needs(workers=1))
    assert sorted(d.key for d in done) == list(range(5))
    assert {line.split()[2] for line in (tmp_path / "log").read_text().splitlines()} == {"shared"}


def test_an_item_that_kills_its_workers_ends_the_run_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match=r"item 3 failed 3 times"):
        run(Setup(tmp_path / "log", poison=3), 6)


def test_our_own_errors_come_through_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(NoSpace, match="3 are free"):
        run(Setup(tmp_path / "log", refuse=2), 4)


def test_a_worker_that_cannot_load_is_named() -> None:
    with (
        RayPool(_cannot_load, HALF, on_event=lambda text: None) as pool,
        pytest.raises(WorkerFailed, match="could not load: ValueError: no such model"),
    ):
        pool.describe()


def _cannot_load() -> Recorder:
    raise ValueError("no such model")


def test_the_local_pool_does_the_same(tmp_path: Path) -> None:
    with LocalPool(Setup(tmp_path / "log", late=True)) as pool:
        done = list(pool.run([Item(i) for i in range(6)], "shared"))
    assert [d.key for d in done] == list(range(6))
