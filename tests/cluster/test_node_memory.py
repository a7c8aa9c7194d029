"""The node's memory actor, on real Ray actors: what it ends, what it spares, how it comes back."""

from __future__ import annotations

import mmap
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from raypipe.cluster import node_memory, remote_guard
from raypipe.cluster.budget import WorkerMemory, budgeted_together
from raypipe.cluster.node_memory import make_everywhere, node_actor, verdict_of
from raypipe.cluster.remote_guard import join
from raypipe.errors import MemoryBudgetExceeded
from raypipe.memory.config import MemoryFlags, resolve
from raypipe.memory.guard import guarding, relieve
from raypipe.memory.limits import node_limits
from raypipe.memory.policy import Limits
from raypipe.memory.probe import ProcessProbe, anon_bytes
from raypipe.memory.records import node_folder
from raypipe.memory.verdict import Verdict, read_all

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]
GIB, MIB = 1024**3, 1024**2
CAPACITY = 8 * GIB
CALL_S = 60


class Worker:
    """Joins its node and then does what a test asks."""

    def begin(
        self,
        budget_bytes: int,
        folder: Path,
        label: str = "worker",
        wait_s: float = 30,
        least_bytes: int | None = None,
    ) -> int:
        self.said: list[str] = []
        self.guard = join(
            budget_bytes,
            label,
            capacity_bytes=CAPACITY,
            verdict_dir=folder,
            wait_s=wait_s,
            least_bytes=least_bytes,
            say=self.said.append,
        )
        return os.getpid()

    def end(self) -> None:
        self.guard.close()

    def has_said(self) -> list[str]:
        return self.said

    def ramp(self, n_bytes: int, step_bytes: int) -> None:
        self.guard.note(batch=8, phase="ramp")
        self.held = []
        for _ in range(n_bytes // step_bytes):
            self.held.append(bytearray(step_bytes))
            time.sleep(0.002)

    def at_once(self, n_bytes: int) -> None:
        self.held = [bytearray(n_bytes)]  # one call of C code that never lets go of the GIL

    def read_mapped(self, path: Path) -> tuple[int, bool]:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
            total = sum(view[at] for at in range(0, len(view), 4096))
            return total, self.guard.pressure()

    def grow_slowly(self) -> list[int]:
        """A batch a step, as large as it may be; what is kept grows until it is told."""
        batch, sizes, kept = 256 * MIB, [], []
        with guarding(self.guard):
            for _ in range(20):
                if self.guard.pressure():
                    batch //= 2
                    kept.clear()
                    relieve()
                self.guard.note(batch=batch)
                kept.append(bytearray(batch // 2))
                sizes.append(batch)
                time.sleep(0.06)
        return sizes


@pytest.fixture
def worker() -> Iterator[Callable[[], Any]]:
    made: list[Any] = []

    def one() -> Any:
        made.append(ray.remote(Worker).options(num_cpus=0, max_restarts=0).remote())
        return made[-1]

    yield one
    for actor in made:
        ray.kill(actor)
    until(lambda: not state()["leases"] and not state()["queue"])


def node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())


def state() -> dict[str, Any]:
    deadline = time.monotonic() + CALL_S
    while True:
        try:
            return dict(ray.get(node_actor(node_id()).state.remote(), timeout=CALL_S))
        except RayActorError:  # Ray gives out a dead actor's handle for a moment
            assert time.monotonic() < deadline
            time.sleep(0.05)


def until(true: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.05)


def get(ref: Any) -> Any:
    return ray.get(ref, timeout=CALL_S)


def verdict_in(folder: Path) -> Verdict:
    until(lambda: list(folder.glob("verdict-*.json")), 5)
    (verdict,) = read_all(folder)
    return verdict


def test_a_ramp_is_ended_and_its_verdict_says_why(
    worker: Callable[[], Any], tmp_path: Path
) -> None:
    actor = worker()
    pid = get(actor.begin.remote(GIB, tmp_path))
    with pytest.raises(RayActorError):
        get(actor.ramp.remote(3 * GIB, 16 * MIB))
    verdict = verdict_in(tmp_path)
    assert (verdict.pid, verdict.label, verdict.budget_bytes) == (pid, "worker", GIB)
    assert Limits.of(GIB).hard_bytes <= verdict.usage_bytes < GIB
    assert (verdict.batch, verdict.phase) == (8, "ramp")
    assert "told" in verdict.tried[0]
    assert verdict_of(node_id(), pid) == verdict, "asked of the actor, after the worker is gone"
    until(lambda: not state()["leases"])


def test_what_holds_the_gil_is_ended_all_the_same(
    worker: Callable[[], Any], tmp_path: Path
) -> None:
    actor = worker()
    get(actor.begin.remote(GIB, tmp_path))
    with pytest.raises(RayActorError):
        get(actor.at_once.remote(4 * GIB))
    assert verdict_in(tmp_path).usage_bytes < GIB + 256 * MIB


def test_pages_of_a_mapped_file_are_nobodys(worker: Callable[[], Any], tmp_path: Path) -> None:
    """Four times the budget, mapped and read, all of it resident."""
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.truncate(2 * GIB)  # holes are pages of the cache like any other once they are read
    actor = worker()
    pid = get(actor.begin.remote(GIB // 2, tmp_path / "verdicts"))
    total, pressed = get(actor.read_mapped.remote(path))
    assert total == 0
    assert not pressed
    assert path.stat().st_size == 4 * (GIB // 2)
    assert verdict_of(node_id(), pid) is None
    assert state()["watched"] == [pid]


def test_slow_growth_is_told_and_never_ended(worker: Callable[[], Any], tmp_path: Path) -> None:
    actor = worker()
    get(actor.begin.remote(2 * GIB, tmp_path))
    sizes = get(actor.grow_slowly.remote())
    assert len(sizes) == 20
    assert sizes[0] > sizes[-1] >= MIB
    assert not list(tmp_path.iterdir())


def test_the_actor_is_back_within_two_seconds_with_its_leases(
    worker: Callable[[], Any], tmp_path: Path
) -> None:
    actors = [worker(), worker()]
    pids = [get(actor.begin.remote(2 * GIB, tmp_path, f"w{n}")) for n, actor in enumerate(actors)]
    before = state()
    assert before["leases"] == {str(pid): 2 * GIB for pid in pids}
    for kill in (
        lambda pid: os.kill(pid, signal.SIGKILL),
        lambda _: ray.kill(node_actor(node_id())),
    ):
        old = state()["pid"]
        started = time.monotonic()
        kill(old)
        took = _back(old, started, pids)
        assert took < 2, f"it took {took:.2f} s"
        now = state()
        assert now["leases"] == before["leases"], "each once, though both brought it back"
        assert now["free_bytes"] == before["free_bytes"]
    # And the new one does its work.
    with pytest.raises(RayActorError):
        get(actors[0].at_once.remote(4 * GIB))
    until(lambda: state()["leases"] == {str(pids[1]): 2 * GIB})
    assert [verdict.pid for verdict in read_all(tmp_path)] == [pids[0]]


def _back(old: int, started: float, pids: list[int]) -> float:
    """Seconds until another process watches ``pids``; asks by name only, and makes nothing."""
    while time.monotonic() < started + 20:
        try:
            actor = ray.get_actor(node_memory.actor_name(node_id()), namespace="raypipe")
            found = ray.get(actor.state.remote(), timeout=10)
        except (ValueError, RayActorError):
            time.sleep(0.02)
            continue
        if found["pid"] != old and sorted(found["watched"]) == sorted(pids):
            return time.monotonic() - started
        time.sleep(0.02)
    raise AssertionError("it did not come back")


def test_an_actor_that_hangs_is_ended_and_made_again(
    worker: Callable[[], Any], tmp_path: Path
) -> None:
    actor = worker()
    pid = get(actor.begin.remote(GIB, tmp_path))
    old = state()["pid"]
    os.kill(old, signal.SIGSTOP)
    assert _back(old, time.monotonic(), [pid]) > 2, "a short pause is forgiven"
    until(lambda: any("hangs" in text for text in get(actor.has_said.remote())))


def test_a_lease_is_free_again_when_its_holder_is_killed(
    worker: Callable[[], Any], tmp_path: Path
) -> None:
    first, second = worker(), worker()
    pid = get(first.begin.remote(6 * GIB, tmp_path))
    waiting = second.begin.remote(6 * GIB, tmp_path)
    until(lambda: len(state()["queue"]) == 1)
    os.kill(pid, signal.SIGKILL)
    other = get(waiting)
    assert state()["leases"] == {str(other): 6 * GIB}
    get(second.end.remote())
    assert state()["leases"] == {}
    get(second.begin.remote(6 * GIB, tmp_path))  # a process may join, leave, and join again


def test_a_lease_that_cannot_be_is_refused_and_a_late_one_gives_up(
    worker: Callable[[], Any], tmp_path: Path
) -> None:
    first, second, third = worker(), worker(), worker()
    get(first.begin.remote(6 * GIB, tmp_path))
    with pytest.raises(MemoryBudgetExceeded, match=r"9.00 GiB are asked for.*8.00 GiB in all"):
        get(second.begin.remote(9 * GIB, tmp_path))
    with pytest.raises(
        MemoryBudgetExceeded, match=r"did not get its memory in 1 s.*worker \(\d+\)"
    ):
        get(third.begin.remote(6 * GIB, tmp_path, wait_s=1))
    assert state()["queue"] == {}


def test_a_budget_that_nobody_stated_shrinks_to_what_is_left(
    worker: Callable[[], Any], tmp_path: Path
) -> None:
    first, second, third = worker(), worker(), worker()
    get(first.begin.remote(5 * GIB, tmp_path))
    pid = get(second.begin.remote(5 * GIB, tmp_path, least_bytes=2 * GIB))
    assert state()["leases"][str(pid)] == 3 * GIB
    assert "3.00 GiB instead of 5.00 GiB" in get(second.has_said.remote())[0]
    with pytest.raises(MemoryBudgetExceeded, match="did not get its memory in 1 s"):
        get(third.begin.remote(5 * GIB, tmp_path, wait_s=1, least_bytes=2 * GIB))
    with pytest.raises(RayActorError):  # and that is what it is kept to
        get(second.at_once.remote(4 * GIB))
    assert verdict_in(tmp_path).budget_bytes == 3 * GIB


class Member:
    """One of a group of two that go on only together; they agree through files."""

    def gather(self, order: WorkerMemory, folder: Path, group: str, member: int) -> float:
        rounds = 0

        def agree(mine: bool) -> bool:
            nonlocal rounds
            rounds += 1
            said = folder / f"{group}-{rounds}-{member}"
            said.with_suffix(".tmp").write_text(str(int(mine)))
            said.with_suffix(".tmp").replace(said)
            other = folder / f"{group}-{rounds}-{1 - member}"
            while not other.exists():
                time.sleep(0.01)
            return mine and other.read_text() == "1"

        with budgeted_together(order, group, agree, gather_s=1.5):
            time.sleep(1.0)
        return time.time()


def test_two_groups_do_not_wait_for_each_others_leases(tmp_path: Path) -> None:
    """Room for two on this machine, four want a lease: one of each group has it, none goes on."""
    most = node_limits().limit_bytes * 4 // 10 // MIB  # of 80 % that are given out
    memory = resolve(MemoryFlags(max_memory_per_process=f"{most}MiB"), environ={})
    order = WorkerMemory(memory=memory, per_node=2, run_dir=None)
    members = {
        (group, n): ray.remote(Member).options(num_cpus=0).remote()
        for n in (0, 1)
        for group in "ab"
    }
    ends = [actor.gather.remote(order, tmp_path, group, n) for (group, n), actor in members.items()]
    assert len(ray.get(ends, timeout=3 * CALL_S)) == 4
    for actor in members.values():
        ray.kill(actor)
    until(lambda: not state()["leases"])


def test_a_process_that_holds_too_much_already_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_guard, "charge_bytes", lambda: 3 * GIB)
    with pytest.raises(MemoryBudgetExceeded, match="before it begins"):
        join(2 * GIB, "driver", capacity_bytes=CAPACITY, verdict_dir=None, wait_s=1)


def test_a_driver_makes_all_actors_beforehand() -> None:
    states = make_everywhere()
    assert list(states) == [node_id()]
    with ProcessProbe(states[node_id()]["pid"]) as probe:
        assert probe.read().anon_bytes < 256 * MIB
    assert anon_bytes() > 0


def test_an_actor_that_nobody_needs_ends_itself() -> None:
    actor = ray.remote(node_memory.NodeMemoryActor).options(num_cpus=0).remote("idle", idle_s=0.5)
    pid = get(actor.state.remote())["pid"]
    folder = node_folder("idle")
    until(lambda: not Path(f"/proc/{pid}").exists())
    assert not folder.exists()
