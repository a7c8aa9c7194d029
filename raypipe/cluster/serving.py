"""The row servers of a run: started on the nodes that alone have some rows, waited for, ended.

What one does is `row_server`'s; which nodes need one, and who reads from it, `shards`'. A person is told
where they start and for which sources, what one that does not come is waiting for, and how long all took.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raypipe.cluster.awaited import Awaited, memory_waits
from raypipe.cluster.budget import LEASE_WAIT_S, Lease, WorkerMemory
from raypipe.cluster.lost import ACTOR_LOST
from raypipe.cluster.node_memory import START_TIMEOUT_S
from raypipe.cluster.pieces import Share
from raypipe.cluster.remote_rows import verdict_on
from raypipe.cluster.row_server import THREADS, Held, RowServer, budget_bytes
from raypipe.cluster.turn import turn
from raypipe.errors import MemoryBudgetExceeded, RaypipeError, WorkerFailed
from raypipe.store import Placement, this_node
from raypipe.stream import ArraySource

READY_S = START_TIMEOUT_S + LEASE_WAIT_S
SAY_EVERY_S = 20.0
# To give a lease back takes milliseconds; of a server that starts yet, or hangs, its node finds the end.
CLOSE_S = 2.0
# How often Ray starts a server again on its node, and sends it what it did not answer.
RESTARTS = 3


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Servers that are ready. ``servers``: actor handles, and ``leases``, by raypipe's node id;
    ``most_bytes``: that those of one machine have leased; ``turn``: of the run, to be given on;
    ``took_s``: to start.
    """

    servers: Mapping[str, Any]
    leases: Mapping[str, Lease]
    most_bytes: int
    turn: Any
    took_s: float


@contextmanager
def serving(
    placed: Mapping[ArraySource, Placement],
    names: Mapping[ArraySource, str],
    shares: Mapping[ArraySource, Share],
    *,
    nodes: Mapping[str, str],
    memory: WorkerMemory | None,
    say: Callable[[str], None],
) -> Iterator[Serving]:
    """A server on every node that has one of ``placed``; ``nodes``: raypipe's id -> Ray's.

    With ``memory`` they have leases, and the run its turn (`raypipe.cluster.turn`). Raises as
    `turn` and `RowServer.ready`, and WorkerFailed for one that does not start.
    """
    there = sorted({place.node for placement in placed.values() for place in placement.places})
    held = {node: _held_on(node, placed) for node in there}
    leases = {
        node: _lease(node, held[node], shares, memory) for node in there if memory is not None
    }
    servers: dict[str, Any] = {}
    with ExitStack() as stack:
        run = _in_words(memory)
        mine = stack.enter_context(turn(run, say)) if memory is not None else None
        stack.callback(_end, servers.values())
        began = time.monotonic()
        say(f"row servers start on {'; '.join(_of(n, held[n], names) for n in there)}")
        for node in there:
            servers[node] = _start_server(nodes[node], held[node], leases.get(node))
        _await_ready(servers, leases, nodes, say)
        yield Serving(
            servers=servers,
            leases=leases,
            most_bytes=_most_of_a_machine(leases, nodes),
            turn=mine,
            took_s=time.monotonic() - began,
        )


def _in_words(memory: WorkerMemory | None) -> str:
    run_dir = memory.run_dir if memory is not None else None
    return f"{run_dir or 'a run'} (process {os.getpid()} on {this_node()})"


def _of(node: str, held: Sequence[Held], names: Mapping[ArraySource, str]) -> str:
    """``node n1 for lh, rh``."""
    return f"node {node} for {', '.join(sorted(names[one.source] for one in held))}"


def _held_on(node: str, placed: Mapping[ArraySource, Placement]) -> list[Held]:
    """Every file that ``node`` has."""
    return [
        Held(source, placement, place)
        for source, placement in placed.items()
        for place in placement.places
        if place.node == node
    ]


def _lease(
    node: str, held: Sequence[Held], shares: Mapping[ArraySource, Share], memory: WorkerMemory
) -> Lease:
    """Of this call alone: the verdicts of an earlier try stay in the run's folder."""
    piece_bytes = max(shares[one.source].piece_rows * one.source.row_bytes for one in held)
    return Lease(
        order=memory,
        label=f"row-server-{node}-{os.urandom(3).hex()}",
        budget_bytes=budget_bytes(piece_bytes, memory.memory.config.budget_bytes),
    )


def _most_of_a_machine(leases: Mapping[str, Lease], nodes: Mapping[str, str]) -> int:
    """Several nodes may be one machine."""
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    leased: Counter[str] = Counter()
    for node, lease in leases.items():
        leased[addresses[nodes[node]]] += lease.budget_bytes
    return max(leased.values(), default=0)


def _start_server(ray_node: str, held: Sequence[Held], lease: Lease | None) -> Any:
    return (
        ray.remote(RowServer)
        .options(
            num_cpus=0,
            max_concurrency=THREADS,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            scheduling_strategy=NodeAffinitySchedulingStrategy(ray_node, soft=False),
        )
        .remote(held, lease)
    )


def _await_ready(
    servers: Mapping[str, Any],
    leases: Mapping[str, Lease],
    nodes: Mapping[str, str],
    say: Callable[[str], None],
) -> None:
    """Until all have their leases and files. Raises the first error."""
    waiting = {server.ready.remote(True): node for node, server in servers.items()}
    try:
        _await(waiting, leases, nodes, say)
    except BaseException:
        _drop(waiting)
        raise


def _drop(calls: Iterable[Any]) -> None:
    """Nobody wants their answers: else Ray says on stderr of each that it will be tried again."""
    for call in calls:
        ray.cancel(call)


def _await(
    waiting: dict[Any, str],
    leases: Mapping[str, Lease],
    nodes: Mapping[str, str],
    say: Callable[[str], None],
) -> None:
    """Takes from ``waiting`` who has answered."""
    began = time.monotonic()
    next_word = began + SAY_EVERY_S
    while waiting:
        ready, _ = ray.wait(list(waiting), timeout=max(0.1, next_word - time.monotonic()))
        for ref in ready:
            node = waiting.pop(ref)
            try:
                ray.get(ref)
            except RayTaskError as error:
                raise (error.cause if isinstance(error.cause, RaypipeError) else error) from None
            except ACTOR_LOST as error:
                if verdict := verdict_on(leases.get(node)):
                    raise MemoryBudgetExceeded(verdict.message()) from error
                raise WorkerFailed(
                    f"the row server of node {node} did not start ({str(error).splitlines()[0]}); "
                    "see to that node, then run the same command again"
                ) from error
        waited_s = time.monotonic() - began
        late = sorted(waiting.values())
        if late and waited_s >= READY_S:
            raise WorkerFailed(
                f"the row server of node {', '.join(late)} is not ready in {READY_S:.0f} s; see to "
                "that node and its disk, then run the same command again"
            )
        if late and time.monotonic() >= next_word:
            for text in _why_late(late, leases, nodes, waited_s):
                say(text)
            next_word = time.monotonic() + SAY_EVERY_S


def _why_late(
    late: Sequence[str], leases: Mapping[str, Lease], nodes: Mapping[str, str], waited_s: float
) -> list[str]:
    """A line on each server of ``late``."""
    who = {node: f"the row server of node {node}" for node in late}
    awaited = {
        node: Awaited(
            who=who[node], label=leases[node].label, ray_node=nodes[node], ends_s=LEASE_WAIT_S
        )
        for node in late
        if node in leases
    }
    waits = memory_waits(list(awaited.values()))
    return [
        waits[awaited[node].label]
        if node in awaited and awaited[node].label in waits
        else f"{who[node]} is not ready after {waited_s:.0f} s: it starts, or opens its files"
        for node in late
    ]


def _end(servers: Any) -> None:
    """Give leases back, then end the actors; one that hangs is ended all the same."""
    if not ray.is_initialized():
        return
    try:
        closing = [server.close.remote() for server in servers]
        if closing:
            _drop(ray.wait(closing, num_returns=len(closing), timeout=CLOSE_S)[1])
    finally:
        for server in servers:
            ray.kill(server)
