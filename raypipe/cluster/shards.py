"""The shards of a training run: where each source's rows lie, and each worker's way to them.

The driver makes `Shards` once (`open_shards`), from catalogs and locators alone; where a source lies
on nodes' disks only, it starts a `row_server` on each of these nodes. `Shards` travels to the Train
workers, which open every source by it: a copy on their own node, the shared path, or rows from the
node that has them (`remote_rows`).
"""

from __future__ import annotations

import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raypipe.cluster.budget import LEASE_WAIT_S, Lease, WorkerMemory
from raypipe.cluster.lost import ACTOR_LOST
from raypipe.cluster.pieces import Share, divide, smallest_object_store
from raypipe.cluster.remote_rows import Copy, Patience, RemoteRows, verdict_on
from raypipe.cluster.row_server import THREADS, Held, RowServer, budget_bytes
from raypipe.errors import MemoryBudgetExceeded, MissingInput, RaypipeError, WorkerFailed
from raypipe.store import Placement, Way, this_node
from raypipe.store.placement import in_words
from raypipe.stream import ArraySource
from raypipe.stream.mapped import MappedRows
from raypipe.stream.reading import RowReader, Source
from raypipe.units import format_bytes

# A process starts in 1 s; on a node that pulls its packages first, in a minute.
START_TIMEOUT_S = 120.0
READY_S = START_TIMEOUT_S + LEASE_WAIT_S
SAY_EVERY_S = 20.0
# How often Ray starts a server again on its node, and sends it what it did not answer.
RESTARTS = 3


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Small and picklable. ``names``, ``placements``, ``shares``: by source; ``servers``: the actor
    handle of each node that rows are read on, by raypipe's node id; ``leases``: theirs, so that a
    worker finds why one was ended; ``server_bytes``: most that those of one machine have leased.
    """

    names: Mapping[ArraySource, str]
    placements: Mapping[ArraySource, Placement]
    shares: Mapping[ArraySource, Share] = field(default_factory=dict)
    servers: Mapping[str, Any] = field(default_factory=dict)
    leases: Mapping[str, Lease] = field(default_factory=dict)
    patience: Patience = field(default_factory=Patience)
    server_bytes: int = 0

    def way(self, source: ArraySource, turn: int = 0) -> Way:
        """The way from this node to a source's rows; nothing is opened."""
        placement = self.placements.get(source)
        if placement is None:  # a task that makes other sources here than on the driver
            placement = Placement.of(source.path, source.fingerprint, source.node)
        return placement.way(this_node(), turn)

    def words(self, turn: int = 0) -> str:
        """The ways from this node, for people: one line; "" when all sources are plain files."""
        return in_words({name: self.way(source, turn) for source, name in self.names.items()})

    def open_rows(
        self, source: Source, *, turn: int, say: Callable[[str], None]
    ) -> MappedRows | RowReader:
        """Open ``source`` the way there is from this node. Raises StoreError, WorkerFailed, and as
        `Source.open`.
        """
        if not isinstance(source, ArraySource):
            return source.open()
        way = self.way(source, turn)
        if way.kind == "shared":
            return source.open()
        if way.kind == "local":
            (place,) = way.places
            if source in self.placements:
                self.placements[source].check(place)
            return replace(source, path=place.path, node=place.node).open()
        copies = [
            Copy(
                replace(source, path=place.path, node=place.node),
                self.servers[place.node],
                self.leases.get(place.node),
            )
            for place in way.places
            if place.node in self.servers
        ]
        if not copies or source not in self.shares:
            raise WorkerFailed(
                f"{source.path} lies on node {way.places[0].node}, and the driver did not know of it: "
                "the task's sources() must be the same there as on the workers"
            )
        name, share = self.names[source], self.shares[source]
        return RemoteRows(source, name, copies, share, say, self.patience)


@contextmanager
def open_shards(
    sources: Mapping[str, Source],
    *,
    batch_rows: int,
    workers: int,
    memory: WorkerMemory | None,
    say: Callable[[str], None],
    patience: Patience | None = None,
) -> Iterator[Shards]:
    """Find where ``sources`` lie, and keep servers on the nodes that alone have some of them.

    ``batch_rows``: of a worker's largest batch. Raises MissingInput when no node of the cluster has
    a source, StoreError for a copy that is not where it is listed, MemoryBudgetExceeded when rows do
    not fit the object store or a server its node's budget, WorkerFailed when one does not start.
    """
    files = {name: source for name, source in sources.items() if isinstance(source, ArraySource)}
    names: dict[ArraySource, str] = {}
    for name, source in files.items():
        names.setdefault(source, name)
    placed = {s: Placement.of(s.path, s.fingerprint, s.node) for s in names}
    far = [source for source in names if not placed[source].shared]
    if not far:
        yield Shards(names=names, placements=placed)
        return
    nodes = node_ids()
    for source in far:
        placed[source] = _present(names[source], placed[source], nodes, say)
    # A worker holds two rings, one to train and one to validate, and both may be full.
    readers = 2 * workers * len(far)
    room = smallest_object_store()
    shares = {source: divide(room, readers, source.row_bytes, batch_rows) for source in far}
    servers: dict[str, Any] = {}
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    leases: dict[str, Lease] = {}
    leased: Counter[str] = Counter()  # bytes by machine: several nodes may be one
    try:
        for node in sorted({place.node for source in far for place in placed[source].places}):
            held = _held_on(node, {source: placed[source] for source in far})
            piece_bytes = max(shares[h.source].piece_rows * h.source.row_bytes for h in held)
            most_bytes = memory.memory.config.budget_bytes if memory else sys.maxsize
            lease_bytes = budget_bytes(piece_bytes, most_bytes)
            leased[addresses[nodes[node]]] += lease_bytes
            if memory is not None:
                # Of this call alone: the verdicts of an earlier try stay in the run's folder.
                label = f"row-server-{node}-{secrets.token_hex(3)}"
                leases[node] = Lease(order=memory, label=label, budget_bytes=lease_bytes)
            servers[node] = _start_server(nodes[node], held, leases.get(node))
        _await_ready(servers, leases, say)
        say(_summary(servers, shares, names, readers, room))
        yield Shards(
            names=names,
            placements=placed,
            shares=shares,
            servers=servers,
            leases=leases,
            patience=patience or Patience(),
            server_bytes=max(leased.values()),
        )
    finally:
        _end(servers.values())


def node_ids() -> dict[str, str]:
    """raypipe's id of each node of the cluster (RAYPIPE_NODE, or its host name) -> Ray's own.

    Ray knows host names only, so each node is asked, by a task there. Of several nodes with one id
    (one machine) the first is named; one that does not answer in time is left out.
    """
    alive = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
    ask = ray.remote(this_node)
    refs = {
        ask.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote(): node_id
        for node_id in alive
    }
    ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=START_TIMEOUT_S)
    found: dict[str, str] = {}
    for ref in refs:
        if ref in ready:
            try:
                found.setdefault(ray.get(ref), refs[ref])
            except ray.exceptions.RayError:  # lost meanwhile
                continue
    return found


def _present(
    name: str, placement: Placement, nodes: Mapping[str, str], say: Callable[[str], None]
) -> Placement:
    """``placement`` with the nodes that are in the cluster. Raises MissingInput without any."""
    first = {place.node: place for place in reversed(placement.places)}  # one of each node
    there = tuple(sorted(place for node, place in first.items() if node in nodes))
    absent = ", ".join(sorted({p.node for p in placement.places if p.node not in nodes}))
    if not there:
        raise MissingInput(
            f"{name}: {placement.path} lies on the disk of {absent} only, and the cluster has "
            f"{', '.join(sorted(nodes))}; start that node (its RAYPIPE_NODE, or host name, is its id), "
            "or copy the store to one that is there: raypipe store replicate"
        )
    if absent:
        say(f"{name}: copies on {absent} are not used: not in the cluster")
    return replace(placement, places=there)


def _held_on(node: str, placed: Mapping[ArraySource, Placement]) -> list[Held]:
    """Every file that ``node`` has."""
    return [
        Held(source, placement, place)
        for source, placement in placed.items()
        for place in placement.places
        if place.node == node
    ]


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
    servers: Mapping[str, Any], leases: Mapping[str, Lease], say: Callable[[str], None]
) -> None:
    """Until all have their leases and files. Raises the first error."""
    waiting = {server.ready.remote(): node for node, server in servers.items()}
    deadline = time.monotonic() + READY_S
    while waiting:
        ready, _ = ray.wait(list(waiting), timeout=SAY_EVERY_S)
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
        late = ", ".join(sorted(waiting.values()))
        if late and time.monotonic() >= deadline:
            raise WorkerFailed(
                f"the row server of node {late} is not ready in {READY_S:.0f} s; see to "
                "that node and its disk, then run the same command again"
            )
        if late and not ready:
            say(
                f"waiting for the row server of node {late}, which waits for its memory, or opens its files"
            )


def _summary(
    servers: Mapping[str, Any],
    shares: Mapping[ArraySource, Share],
    names: Mapping[ArraySource, str],
    readers: int,
    room: int,
) -> str:
    each = ", ".join(
        f"{names[source]} {share.pieces} x {format_bytes(share.piece_rows * source.row_bytes)}"
        for source, share in shares.items()
    )
    return (
        f"rows are read on {', '.join(servers)} for workers elsewhere; under way at most, for each of "
        f"{readers} readers: {each}; in all half of an object store of {format_bytes(room)}"
    )


def _end(servers: Any) -> None:
    """Give leases back, then end the actors; one that hangs is ended all the same."""
    if not ray.is_initialized():
        return
    closing = [server.close.remote() for server in servers]
    if closing:
        ray.wait(closing, num_returns=len(closing), timeout=5.0)
    for server in servers:
        ray.kill(server)
