"""A worker's budget on the node where it lands: what it was given, or its share of that node.

Nodes differ, so the share is computed there. A budget that a person stated is kept or refused; one
that the machine's size suggested shrinks until all workers of the node fit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from raypipe.cluster.node_memory import RemoteGuard, join
from raypipe.errors import MemoryBudgetExceeded
from raypipe.memory.attend import FOLDER, attend
from raypipe.memory.config import MemoryConfig, ResolvedMemory
from raypipe.memory.guard import Guard
from raypipe.memory.limits import NodeLimits, node_limits
from raypipe.memory.turns import Seat
from raypipe.memory.verdict import Verdict, read_all
from raypipe.units import format_bytes

# A lease that does not come in this time will not: the node's other work outlasts ours.
LEASE_WAIT_S = 600.0
PER_PROCESS = "max_memory_per_process_gb"


@dataclass(frozen=True, kw_only=True)
class WorkerMemory:
    """What travels to a worker. per_node : workers of this run that may land on one node."""

    memory: ResolvedMemory
    per_node: int
    run_dir: Path | None

    @property
    def verdict_dir(self) -> Path | None:
        """Where the verdicts on this run's workers are written."""
        return self.run_dir / FOLDER if self.run_dir else None


def worker_budget(memory: ResolvedMemory, per_node: int, limits: NodeLimits) -> tuple[int, int]:
    """(budget of one worker, capacity of the node) in bytes.

    Raises MemoryBudgetExceeded when ``per_node`` workers of a stated budget do not fit the node.
    """
    capacity = memory.config.capacity_bytes(limits)
    stated = not memory.sources[PER_PROCESS].startswith("auto")
    budget = (memory.config if stated else MemoryConfig.auto(limits)).budget_bytes
    if budget * per_node <= capacity:
        return budget, capacity
    if stated:
        raise MemoryBudgetExceeded(
            f"{per_node} worker(s) of {format_bytes(budget)} ({memory.sources[PER_PROCESS]}) need "
            f"{format_bytes(budget * per_node)}, this node can give {format_bytes(capacity)} "
            f"({format_bytes(limits.limit_bytes)} by {limits.limit_source}, "
            f"{memory.config.available_memory_buffer:.0%} kept free); give fewer --workers or a "
            "smaller --max-memory-per-process"
        )
    return capacity // per_node, capacity


def is_younger(guard: Guard, than: float) -> bool:
    """Whether the memory actor behind ``guard`` began after ``than`` (seconds since 1970).

    Ray's own monitor ends the newest first: a worker that is older than its node's actor would
    outlive it. See ``node_memory``.
    """
    return isinstance(guard, RemoteGuard) and guard.since > than


@contextmanager
def budgeted(order: WorkerMemory, name: str, seat: Seat | None = None) -> Iterator[Guard]:
    """This worker under its node's memory actor, with its lease, for the length of the block.

    seat : of one that will wait for others of its group; see ``memory.turns``.
    """
    budget, capacity = worker_budget(order.memory, order.per_node, node_limits())
    if order.verdict_dir:
        order.verdict_dir.mkdir(parents=True, exist_ok=True)
    with (
        join(
            budget,
            name,
            capacity_bytes=capacity,
            verdict_dir=order.verdict_dir,
            wait_s=LEASE_WAIT_S,
            seat=seat,
        ) as guard,
        attend(order.memory, order.run_dir, f"{name}-{os.getpid()}", guard),
    ):
        yield guard


def verdicts(order: WorkerMemory | None, name: str) -> list[Verdict]:
    """What the nodes wrote of workers called ``name`` in this run, oldest first."""
    if order is None or order.verdict_dir is None or not order.verdict_dir.is_dir():
        return []
    found = [verdict for verdict in read_all(order.verdict_dir) if verdict.label == name]
    return sorted(found, key=lambda verdict: verdict.when)
