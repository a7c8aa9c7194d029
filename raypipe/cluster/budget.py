"""A worker's budget on the node where it lands: what it was given, or its share of that node.

Nodes differ, so the share is computed there. A budget that a person stated is kept or refused; one
that the machine's size suggested shrinks until all workers of the node fit, beside the processes
that help them (decoders, row servers), whose budgets are computed from what they hold.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from raypipe.cluster.remote_guard import (
    SAY_WAITING_EVERY_S,
    LeaseTimeout,
    RemoteGuard,
    join,
    to_stderr,
)
from raypipe.errors import MemoryBudgetExceeded
from raypipe.memory.attend import FOLDER, attend
from raypipe.memory.config import MemoryConfig, ResolvedMemory
from raypipe.memory.guard import Guard
from raypipe.memory.limits import NodeLimits, node_limits
from raypipe.memory.policy import SMALLEST_BUDGET_BYTES
from raypipe.memory.verdict import Verdict, read_all
from raypipe.units import format_bytes

# A lease that does not come in this time will not: the node's other work outlasts ours.
LEASE_WAIT_S = 600.0
# Who helps was counted when the workers' budgets were: it waits for a predecessor's end at most.
HELPER_WAIT_S = 120.0
GATHER_S = 15.0
VERDICT_LOOK_S = 0.05
# With less no worker that uses torch gets far; an automatic budget shrinks to this where others
# hold the rest of the machine.
LEAST_BYTES = 2 * 1024**3
PER_PROCESS = "max_memory_per_process_gb"


@dataclass(frozen=True, kw_only=True)
class WorkerMemory:
    """What travels to a worker. per_node : workers of this run that may land on one node.

    beside_bytes : leases of the run's other processes there, which workers must leave to them
    """

    memory: ResolvedMemory
    per_node: int
    run_dir: Path | None
    beside_bytes: int = 0

    @property
    def verdict_dir(self) -> Path | None:
        """Where the verdicts on this run's workers are written."""
        return self.run_dir / FOLDER if self.run_dir else None


@dataclass(frozen=True, kw_only=True)
class Lease:
    """What an actor beside the workers asks of its node.

    label : names this one actor, in verdicts too. budget_bytes : as computed, see ``helping``.
    """

    order: WorkerMemory
    label: str
    budget_bytes: int


@dataclass(frozen=True, kw_only=True)
class Share:
    """One process's budget and what its node gives out in all, in bytes; the others : see ``Ask``."""

    budget_bytes: int
    capacity_bytes: int
    least_bytes: int | None = None
    beside_bytes: int = 0
    priority: int = 0


def worker_share(
    memory: ResolvedMemory, per_node: int, limits: NodeLimits, beside_bytes: int = 0
) -> Share:
    """The budget of one worker of ``per_node`` on a node; beside_bytes : see ``WorkerMemory``.

    Raises MemoryBudgetExceeded when so many workers of a stated budget do not fit the node, or what
    is beside them leaves nothing.
    """
    capacity = memory.config.capacity_bytes(limits)
    stated = not memory.sources[PER_PROCESS].startswith("auto")
    budget = (memory.config if stated else MemoryConfig.auto(limits)).budget_bytes
    left = (capacity - beside_bytes) // per_node
    crowded = beside_bytes > 0 and left < SMALLEST_BUDGET_BYTES
    if crowded or (stated and budget > left):
        helpers = (
            f" and {format_bytes(beside_bytes)} for the decoders and row servers beside them"
            if beside_bytes
            else ""
        )
        raise MemoryBudgetExceeded(
            f"{per_node} worker(s) of {format_bytes(budget)} ({memory.sources[PER_PROCESS]}) need "
            f"{format_bytes(budget * per_node)}{helpers}, this node can give "
            f"{format_bytes(capacity)} "
            f"({format_bytes(limits.limit_bytes)} by {limits.limit_source}, "
            f"{memory.config.available_memory_buffer:.0%} kept free); give fewer --workers or a "
            "smaller --max-memory-per-process"
        )
    budget = min(budget, left)
    least = None if stated else min(budget, LEAST_BYTES)
    return Share(
        budget_bytes=budget,
        capacity_bytes=capacity,
        least_bytes=least,
        beside_bytes=beside_bytes,
    )


def is_younger(guard: Guard, than: float) -> bool:
    """Whether the memory actor behind ``guard`` began after ``than`` (seconds since 1970).

    Ray's own monitor ends the newest first: a worker that is older than its node's actor would
    outlive it. See ``node_memory``.
    """
    return isinstance(guard, RemoteGuard) and guard.since > than


@contextmanager
def leased(
    order: WorkerMemory,
    name: str,
    share: Share,
    limits: NodeLimits,
    wait_s: float,
    say: Callable[[str], None] = to_stderr,
) -> Iterator[Guard]:
    """This process under its node's memory actor, with ``share`` as its lease, for the length of the
    block; its log is ``name`` and its number. Raises as `remote_guard.join`.
    """
    if order.verdict_dir:
        order.verdict_dir.mkdir(parents=True, exist_ok=True)
    with (
        join(
            share.budget_bytes,
            name,
            capacity_bytes=share.capacity_bytes,
            shared_by=limits.shared_by,
            least_bytes=share.least_bytes,
            beside_bytes=share.beside_bytes,
            priority=share.priority,
            verdict_dir=order.verdict_dir,
            wait_s=wait_s,
            say=say,
        ) as guard,
        attend(order.memory, order.run_dir, f"{name}-{os.getpid()}", guard),
    ):
        yield guard


@contextmanager
def budgeted(
    order: WorkerMemory,
    name: str,
    wait_s: float = LEASE_WAIT_S,
    say: Callable[[str], None] = to_stderr,
) -> Iterator[Guard]:
    """A worker with its share of the node. Raises as ``worker_share`` and ``leased``."""
    limits = node_limits()
    share = worker_share(order.memory, order.per_node, limits, order.beside_bytes)
    with leased(order, name, share, limits, wait_s, say) as guard:
        yield guard


@contextmanager
def helping(
    order: WorkerMemory,
    name: str,
    budget_bytes: int,
    *,
    wait_s: float = HELPER_WAIT_S,
    goes_on: bool = True,
) -> Iterator[Guard]:
    """A process beside the workers, with a budget that was computed. Raises as ``leased``.

    Of a run that ``goes_on`` already it comes before workers that wait: it must not wait for theirs.
    Of one that only starts it waits behind who asked before.
    """
    limits = node_limits()
    capacity = order.memory.config.capacity_bytes(limits)
    share = Share(
        budget_bytes=min(budget_bytes, capacity),
        capacity_bytes=capacity,
        priority=-1 if goes_on else 0,
    )
    with leased(order, name, share, limits, wait_s) as guard:
        yield guard


@contextmanager
def budgeted_together(
    order: WorkerMemory,
    name: str,
    agree: Callable[[bool], bool],
    gather_s: float = GATHER_S,
    say: Callable[[str], None] = to_stderr,
) -> Iterator[Guard]:
    """As ``budgeted``, for workers that go on only together: all have their leases, or none has.

    Two groups that each held some of theirs, on whatever nodes and of whatever clusters, would wait
    for the other's for ever. So a group that is not complete after ``gather_s`` gives all back and
    tries again after a pause; its length is the group's own, so that of two groups one comes first.

    agree(mine) : whether all members say yes; called by all of them, in step. say : told by those
    who miss theirs, within 30 s. Raises LeaseTimeout: no round begins `LEASE_WAIT_S` after the first,
    but for the pause before it.
    """
    pauses, next_word = random.Random(name), time.monotonic()
    deadline = next_word + LEASE_WAIT_S
    while True:
        missing: LeaseTimeout | None = None
        with ExitStack() as stack:
            guard: Guard | None = None
            try:
                guard = stack.enter_context(budgeted(order, name, gather_s, say))
            except LeaseTimeout as error:
                missing = error
                if time.monotonic() >= next_word:
                    left_s = max(0.0, deadline - time.monotonic())
                    say(f"{error}; it asks again for {left_s:.0f} s")
                    next_word = time.monotonic() + SAY_WAITING_EVERY_S
            if agree(guard is not None):
                assert guard is not None
                yield guard
                return
        if not agree(time.monotonic() < deadline):  # all give up together
            break
        time.sleep(pauses.uniform(0, gather_s))
    raise missing or LeaseTimeout(
        f"{name}: other workers of this training did not get their memory in {LEASE_WAIT_S:.0f} s; "
        "give fewer --workers or a smaller --max-memory-per-process, or wait for other runs to end"
    )


def await_verdict(order: WorkerMemory | None, name: str, wait_s: float) -> Verdict | None:
    """The last verdict on a worker called ``name``, which is gone. It is written after the kill, and a
    network disk shows it later: it is waited for.
    """
    deadline = time.monotonic() + wait_s
    while order is not None and order.verdict_dir is not None:
        found = verdicts(order, name)
        if found:
            return found[-1]
        if time.monotonic() > deadline:
            break
        time.sleep(VERDICT_LOOK_S)
    return None


def verdicts(order: WorkerMemory | None, name: str) -> list[Verdict]:
    """What the nodes wrote of workers called ``name`` in this run, oldest first."""
    if order is None or order.verdict_dir is None or not order.verdict_dir.is_dir():
        return []
    found = [verdict for verdict in read_all(order.verdict_dir) if verdict.label == name]
    return sorted(found, key=lambda verdict: verdict.when)
