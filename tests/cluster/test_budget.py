"""What a worker may take on the node where it lands, and what its end by the budget becomes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypipe.cluster.budget import worker_budget
from raypipe.errors import MemoryBudgetExceeded
from raypipe.memory.config import MemoryFlags, ResolvedMemory, resolve
from raypipe.memory.limits import NodeLimits

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
    budget, capacity = worker_budget(memory, workers, node(gib))
    assert capacity == memory.config.capacity_bytes(node(gib))
    assert 0 < budget * workers <= capacity
    assert budget <= memory.config.budget_bytes


def test_the_share_is_of_the_node_where_the_worker_lands() -> None:
    memory = resolved(None, 8)  # the driver's own node is small
    assert worker_budget(memory, 1, node(512))[0] == 16 * GIB


def test_a_stated_budget_is_kept_or_refused() -> None:
    memory = resolved("6GiB", 32)
    assert worker_budget(memory, 4, node(32))[0] == 6 * GIB
    with pytest.raises(MemoryBudgetExceeded, match=r"5 worker\(s\) of 6.00 GiB.*fewer --workers"):
        worker_budget(memory, 5, node(32))
    assert worker_budget(replace(memory), 5, node(64))[0] == 6 * GIB
