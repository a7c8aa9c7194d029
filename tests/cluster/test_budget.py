"""What a worker may take on the node where it lands, and what its end by the budget becomes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypipe.cluster import budget as budget_file
from raypipe.cluster import remote_guard
from raypipe.cluster.budget import LEAST_BYTES, WorkerMemory, budgeted_together, worker_share
from raypipe.cluster.remote_guard import LeaseTimeout
from raypipe.errors import MemoryBudgetExceeded
from raypipe.memory.config import MemoryFlags, ResolvedMemory, resolve
from raypipe.memory.limits import NodeLimits
from raypipe.memory.node import Answer
from raypipe.memory.policy import SMALLEST_BUDGET_BYTES
from raypipe.memory.records import Ask
from raypipe.memory.registration import Registration
from raypipe.store import this_node

GIB = 1024**3


def node(gib: float) -> NodeLimits:
    return NodeLimits(
        physical_bytes=int(gib * GIB),
        cgroup_bytes=None,
        slurm_bytes=None,
        slurm_tasks=None,
        shm_bytes=GIB,
        shm_free_bytes=GIB,
    )


def resolved(budget: str | None, gib: float) -> ResolvedMemory:
    flags = MemoryFlags(max_memory_per_process=budget)
    return resolve(flags, environ={}, limits=node(gib))


@given(workers=st.integers(1, 64), gib=st.floats(4, 512))
def test_shares_of_a_node_fit_it(workers: int, gib: float) -> None:
    memory = resolved(None, gib)
    share = worker_share(memory, workers, node(gib))
    assert share.capacity_bytes == memory.config.capacity_bytes(node(gib))
    assert 0 < share.budget_bytes * workers <= share.capacity_bytes
    assert share.budget_bytes <= memory.config.budget_bytes
    assert share.least_bytes == min(share.budget_bytes, LEAST_BYTES)


def test_the_share_is_of_the_node_where_the_worker_lands() -> None:
    memory = resolved(None, 8)  # the driver's own node is small
    assert worker_share(memory, 1, node(512)).budget_bytes == 16 * GIB


def test_a_stated_budget_is_kept_or_refused() -> None:
    memory = resolved("6GiB", 32)
    share = worker_share(memory, 4, node(32))
    assert (share.budget_bytes, share.least_bytes) == (6 * GIB, None)
    with pytest.raises(MemoryBudgetExceeded, match=r"5 worker\(s\) of 6.00 GiB.*fewer --workers"):
        worker_share(memory, 5, node(32))
    assert worker_share(replace(memory), 5, node(64)).budget_bytes == 6 * GIB


@given(workers=st.integers(1, 16), gib=st.floats(8, 512), beside=st.integers(0, 16 * GIB))
def test_workers_leave_their_share_to_those_beside_them(
    workers: int, gib: float, beside: int
) -> None:
    memory = resolved(None, gib)
    capacity = memory.config.capacity_bytes(node(gib))
    if beside > 0 and (capacity - beside) // workers < SMALLEST_BUDGET_BYTES:
        with pytest.raises(MemoryBudgetExceeded, match="decoders and row servers beside them"):
            worker_share(memory, workers, node(gib), beside)
    else:
        share = worker_share(memory, workers, node(gib), beside)
        assert share.budget_bytes * workers + beside <= capacity
        assert share.beside_bytes == beside


def test_a_stated_budget_counts_those_beside_it() -> None:
    memory = resolved("6GiB", 32)  # 25.6 GiB to give
    assert worker_share(memory, 4, node(32), GIB).budget_bytes == 6 * GIB
    with pytest.raises(
        MemoryBudgetExceeded, match=r"need 24\.0 GiB and 2\.00 GiB for the decoders"
    ):
        worker_share(memory, 4, node(32), 2 * GIB)


HELD = "6.00 GiB are asked for, 1.00 GiB of 8.00 GiB are free; held by row-server-A (7) 7.00 GiB"


def test_who_waits_says_on_which_node_for_what_and_who_holds_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = Answer(state="queued", text=HELD, pid=1)
    monkeypatch.setattr(remote_guard, "call", lambda *_: answer)
    monkeypatch.setattr(remote_guard, "FIRST_WORD_S", 0.1)
    slot = Path("/nowhere/slot")
    mine = Registration(pid=1, start_ticks=1, budget_bytes=6 * GIB, label="worker", slot_path=slot)
    ask, said = Ask(registration=mine, capacity_bytes=8 * GIB), list[str]()
    with pytest.raises(
        LeaseTimeout, match=rf"on node {this_node()} did not .* in 1 s: 6\.00 GiB"
    ) as stop:
        remote_guard._wait_for_lease("ab", ask, 0.6, said.append)
    assert stop.value.exit_code == 3
    assert said == [f"worker on node {this_node()} waits for memory: {HELD}; ends in 0 s"]


def test_a_group_that_misses_a_lease_says_so_in_its_first_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its rounds are shorter than a single worker's first word."""

    def budgeted(*_: object) -> None:
        raise LeaseTimeout(f"worker on node A did not get its memory in 15 s: {HELD}")

    monkeypatch.setattr(budget_file, "budgeted", budgeted)
    monkeypatch.setattr(budget_file, "LEASE_WAIT_S", 0.3)
    assert budget_file.GATHER_S < remote_guard.FIRST_WORD_S <= 30
    order = WorkerMemory(memory=resolved(None, 8), per_node=1, run_dir=None)
    said: list[str] = []
    with (
        pytest.raises(LeaseTimeout, match="held by row-server-A"),
        budgeted_together(order, "group", lambda mine: mine, 0.1, said.append),
    ):
        pass
    assert len(said) == 1 and said[0].endswith(
        "held by row-server-A (7) 7.00 GiB; it asks again for 0 s"
    )


def test_a_group_does_not_ask_longer_than_one_worker_and_ends_in_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its pauses count; and members whose clocks differ give up in the same round."""
    now, rounds = [0.0], list[bool]()

    def budgeted(order: object, name: str, wait_s: float, say: object) -> None:
        now[0] += wait_s
        raise LeaseTimeout(HELD)

    def agree(mine: bool) -> bool:
        rounds.append(mine)
        return mine and len(rounds) != 2 * 5  # another member's time is over in the fifth

    clock = SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s)
    )
    monkeypatch.setattr(budget_file, "time", clock)
    monkeypatch.setattr(budget_file, "budgeted", budgeted)
    order = WorkerMemory(memory=resolved(None, 8), per_node=1, run_dir=None)
    for all_say_yes, at_most_rounds in ((lambda mine: mine, 40), (agree, 5)):
        now[0] = 0.0
        with (
            pytest.raises(LeaseTimeout),
            budgeted_together(order, "group", all_say_yes, say=lambda text: None),
        ):
            pass
        assert now[0] <= budget_file.LEASE_WAIT_S + 2 * budget_file.GATHER_S
        assert now[0] <= at_most_rounds * 2 * budget_file.GATHER_S
        assert at_most_rounds == 5 or now[0] >= budget_file.LEASE_WAIT_S
    assert len(rounds) == 10
