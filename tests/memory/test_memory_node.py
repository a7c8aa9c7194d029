"""A node's memory without Ray: admission, and what a successor takes over."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from raypipe.memory import node as node_module
from raypipe.memory.node import Answer, NodeMemory
from raypipe.memory.probe import ProcessProbe
from raypipe.memory.records import Ask, clear_abandoned_folders, machine_lock, slot_path
from raypipe.memory.registration import Registration
from raypipe.memory.slot import Sentence, Slot

GIB = 1024**3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "raypipe-memory-0-node"
    made.mkdir()
    return made


@pytest.fixture
def make(folder: Path) -> Iterator[Callable[[], NodeMemory]]:
    made: list[NodeMemory] = []

    def one() -> NodeMemory:
        made.append(NodeMemory(folder))
        return made[-1]

    yield one
    for memory in made:
        memory.close()


@pytest.fixture
def sleepers() -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def one() -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "120"]))
        return started[-1]

    yield one
    for process in started:
        process.kill()
        process.wait()


Sleepers = Callable[[], "subprocess.Popen[bytes]"]
Beside = tuple[NodeMemory, Path]


@pytest.fixture
def beside(folder: Path) -> Iterator[Beside]:
    """Another ledger of the same machine, and its folder."""
    neighbour = folder.with_name("raypipe-memory-0-neighbour")
    neighbour.mkdir()
    memory = NodeMemory(neighbour)
    yield memory, neighbour
    memory.close()


def ask_of(
    process: subprocess.Popen[bytes], folder: Path, gib: float, capacity_gib: float = 10
) -> Ask:
    with ProcessProbe(process.pid) as probe:
        start = probe.start_ticks
    path = slot_path(folder, process.pid, start)
    if not path.exists():
        Slot.create(path).close()
    registration = Registration(
        pid=process.pid,
        start_ticks=start,
        budget_bytes=int(gib * GIB),
        label=f"p{process.pid}",
        slot_path=path,
        verdict_dir=folder.parent / "verdicts",
    )
    return Ask(registration=registration, capacity_bytes=int(capacity_gib * GIB))


def until(true: Callable[[], object], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


def state(answer: Answer) -> str:
    return answer.state


def test_a_lease_goes_with_its_holder(
    make: Callable[[], NodeMemory], folder: Path, sleepers: Sleepers
) -> None:
    node, first, second = make(), sleepers(), sleepers()
    assert state(node.admit(ask_of(first, folder, 8))) == "granted"
    waiting = ask_of(second, folder, 8)
    answer = node.admit(waiting)
    assert answer.state == "queued"
    held = f"held by p{first.pid} ({first.pid}) 8.00 GiB of {folder.parent}"
    assert held in answer.text
    time.sleep(0.05)
    told = node.why_waiting(f"p{second.pid}")
    assert told is not None and held in told.text and 0.05 <= told.seconds < 30
    node.admit(waiting)  # asks again: it waits as ever
    again = node.why_waiting(f"p{second.pid}")
    assert again is not None and again.seconds >= told.seconds
    assert node.why_waiting(f"p{first.pid}") is node.why_waiting("nobody") is None
    first.kill()  # and not reaped: a zombie holds nothing
    until(lambda: node.admit(waiting).state == "granted")
    assert node.state()["leases"] == {str(second.pid): 8 * GIB}
    assert node.state()["watched"] == [second.pid]
    node.leave(waiting.holder)
    assert node.state()["leases"] == {}
    until(lambda: not list(folder.iterdir()))


def test_the_dead_do_not_hold_a_place_in_the_queue(
    make: Callable[[], NodeMemory], folder: Path, sleepers: Sleepers
) -> None:
    node, first, large, small = make(), sleepers(), sleepers(), sleepers()
    node.admit(ask_of(first, folder, 4))
    assert state(node.admit(ask_of(large, folder, 10))) == "queued"
    later = ask_of(small, folder, 1)
    assert state(node.admit(later)) == "queued", "the large one was first"
    large.kill()
    until(lambda: node.admit(later).state == "granted")


def test_what_can_never_be_granted_is_refused(
    make: Callable[[], NodeMemory], folder: Path, sleepers: Sleepers
) -> None:
    node, process = make(), sleepers()
    answer = node.admit(ask_of(process, folder, 11))
    assert answer.state == "refused"
    assert "gives out 10.0 GiB in all" in answer.text


def test_two_ledgers_of_one_machine_do_not_give_out_the_same_bytes(
    make: Callable[[], NodeMemory], beside: Beside, folder: Path, sleepers: Sleepers
) -> None:
    """As two clusters on one machine have them."""
    here, first, second = make(), sleepers(), sleepers()
    there, neighbour = beside
    assert state(there.admit(ask_of(first, neighbour, 7))) == "granted"
    waiting = ask_of(second, folder, 7)
    answer = here.admit(waiting)
    assert answer.state == "queued"
    assert "7.00 GiB by other nodes or clusters on this machine" in answer.text
    first.kill()
    until(lambda: here.admit(waiting).state == "granted")
    third = sleepers()
    assert state(there.admit(ask_of(third, neighbour, 4))) == "queued"
    more = ask_of(third, neighbour, 4, capacity_gib=11)
    until(lambda: there.admit(more).state == "granted")


def test_jobs_with_limits_of_their_own_do_not_take_from_each_other(
    make: Callable[[], NodeMemory], beside: Beside, folder: Path, sleepers: Sleepers
) -> None:
    here, first, second = make(), sleepers(), sleepers()
    there, neighbour = beside
    theirs = replace(ask_of(first, neighbour, 7), shared_by="Slurm job 1")
    assert state(there.admit(theirs)) == "granted"
    ours = ask_of(second, folder, 7)
    assert state(here.admit(replace(ours, shared_by="Slurm job 1"))) == "queued"
    assert state(here.admit(replace(ours, shared_by=""))) == "queued", "all share the machine's"
    assert state(here.admit(replace(ours, shared_by="Slurm job 2"))) == "granted"


def test_the_watch_goes_on_while_another_ledger_holds_the_machine(
    make: Callable[[], NodeMemory], folder: Path, sleepers: Sleepers
) -> None:
    """As one does that is stopped, or frozen with its container."""
    node, first, second = make(), sleepers(), sleepers()
    held = ask_of(first, folder, 1)
    node.admit(held)
    with machine_lock(folder):
        waiting = threading.Thread(target=node.admit, args=(ask_of(second, folder, 1),))
        waiting.start()
        first.kill()
        until(lambda: node.state()["leases"] == {}, seconds=0.9)
        waiting.join()
        assert "another ledger of this machine holds" in node.admit(held).text
    assert state(node.admit(ask_of(second, folder, 1))) == "granted"


def test_who_stops_asking_holds_no_place_in_the_queue(
    make: Callable[[], NodeMemory],
    folder: Path,
    sleepers: Sleepers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(node_module, "SILENT_S", 0.5)
    node, first, stopped, later = make(), sleepers(), sleepers(), sleepers()
    node.admit(ask_of(first, folder, 8))
    large, small = ask_of(stopped, folder, 8), ask_of(later, folder, 2)
    node.admit(large)
    answer = node.admit(small)
    assert (answer.state, "before it comes" in answer.text) == ("queued", True)
    until(lambda: node.admit(small).state == "granted")
    assert state(node.admit(large)) == "queued", "back from its pause, it asks again"


def test_a_smaller_lease_will_do_where_one_is_asked_for_that_may_shrink(
    make: Callable[[], NodeMemory], folder: Path, sleepers: Sleepers
) -> None:
    node, first, second = make(), sleepers(), sleepers()
    node.admit(ask_of(first, folder, 7))
    asked = replace(ask_of(second, folder, 8), least_bytes=2 * GIB)
    answer = node.admit(asked)
    assert (answer.state, answer.budget_bytes) == ("granted", 3 * GIB)
    again = node.admit(asked)  # its first answer was lost
    assert (again.state, again.budget_bytes) == ("granted", 3 * GIB)
    assert node.state()["free_bytes"] == 0
    assert state(node.admit(ask_of(sleepers(), folder, 1))) == "queued"


def test_the_smallest_stated_capacity_holds_while_who_stated_it_is_there(
    make: Callable[[], NodeMemory], folder: Path, sleepers: Sleepers
) -> None:
    node, first, second = make(), sleepers(), sleepers()
    careful = ask_of(first, folder, 2, capacity_gib=4)
    node.admit(careful)
    generous = ask_of(second, folder, 3, capacity_gib=10)
    assert state(node.admit(generous)) == "queued"
    node.leave(careful.holder)
    assert state(node.admit(generous)) == "granted"


def test_a_successor_knows_who_holds_what_before_it_answers(
    make: Callable[[], NodeMemory], folder: Path, sleepers: Sleepers
) -> None:
    """The first stands for a process killed -9: it is never told to let go."""
    before, living, dying = make(), sleepers(), sleepers()
    held = ask_of(living, folder, 6)
    before.admit(held)
    before._closed.set()
    before._watch.stop()
    condemned = ask_of(dying, folder, 3)
    before.admit(condemned)
    slot = Slot(condemned.registration.slot_path)
    slot.batch = 4
    slot.sentence = Sentence(time.time_ns(), 3 * GIB, 0, 0, 0)
    dying.kill()
    dying.wait()

    after = make()
    assert after.state()["leases"] == {str(living.pid): 6 * GIB}
    assert after.state()["watched"] == [living.pid]
    assert state(after.admit(held)) == "granted"
    assert after.state()["free_bytes"] == 4 * GIB, "asked again, it is one lease"
    verdict = after.verdict_of(dying.pid)
    assert verdict is not None
    assert (verdict.usage_bytes, verdict.batch) == (3 * GIB, 4)
    assert list((folder.parent / "verdicts").glob("verdict-*"))


def test_a_record_that_was_lost_is_made_good_by_its_holder(
    make: Callable[[], NodeMemory], folder: Path, sleepers: Sleepers
) -> None:
    node, first, second = make(), sleepers(), sleepers()
    node.admit(ask_of(first, folder, 8))
    again = replace(ask_of(second, folder, 8), holds=True)
    assert state(node.admit(again)) == "granted"
    assert node.state()["free_bytes"] == -6 * GIB


def test_a_folder_of_the_dead_is_cleared_and_no_other(folder: Path, sleepers: Sleepers) -> None:
    process = sleepers()
    with ProcessProbe(process.pid) as probe:
        start = probe.start_ticks
    for name, stem, age in (
        ("a", "1-1", 7200), ("b", f"{process.pid}-{start}", 7200), ("c", "1-1", 120),
        ("d", "", 120), ("e", "", 0),
    ):  # fmt: skip
        other = folder.with_name(f"raypipe-memory-0-{name}")
        other.mkdir()
        if stem:
            (other / f"{stem}.slot").touch()
        then = time.time() - age
        os.utime(other, (then, then))
    clear_abandoned_folders(folder)
    left = sorted(path.name[-1] for path in folder.parent.glob("raypipe-memory-0-?"))
    assert left == ["b", "c", "e"]


@pytest.mark.parametrize("others_gib", [0, 5, 7])
def test_a_worker_leaves_to_its_helpers_what_they_need(
    make: Callable[[], NodeMemory], folder: Path, sleepers: Sleepers, others_gib: int
) -> None:
    node = make()
    if others_gib:
        assert node.admit(ask_of(sleepers(), folder, others_gib)).state == "granted"
    worker = replace(ask_of(sleepers(), folder, 8), least_bytes=GIB, beside_bytes=2 * GIB)
    answer = node.admit(worker)
    assert (answer.state, answer.budget_bytes) == ("granted", (8 - others_gib) * GIB)
    assert node.admit(worker) == answer  # it may not have heard
    assert node.admit(ask_of(sleepers(), folder, 2)).state == "granted"  # a helper


def test_helpers_of_a_run_that_goes_on_come_before_workers_that_wait(
    make: Callable[[], NodeMemory], folder: Path, sleepers: Sleepers
) -> None:
    node = make()
    assert node.admit(ask_of(sleepers(), folder, 6)).state == "granted"
    assert node.admit(ask_of(sleepers(), folder, 8)).state == "queued"  # another run's worker
    helper = ask_of(sleepers(), folder, 2)
    assert node.admit(replace(helper, priority=-1)).state == "granted"
