"""The shards of a training run: where each source's rows lie, and each worker's way to them.

The driver makes `Shards` once (`open_shards`), from catalogs and locators alone; where a source lies
on nodes' disks only, it starts a `row_server` on each of these nodes. `Shards` travels to the Train
workers, which open every source by it: a copy on their own node, the shared path, or rows from the
node that has them (`remote_rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raypipe.cluster.budget import Lease, WorkerMemory
from raypipe.cluster.node_memory import START_TIMEOUT_S
from raypipe.cluster.pieces import Share, divide, smallest_object_store
from raypipe.cluster.remote_rows import Copy, Patience, RemoteRows
from raypipe.cluster.serving import Serving, serving
from raypipe.cluster.stalls import Stalls
from raypipe.cluster.turn import give_on
from raypipe.errors import MissingInput, WorkerFailed
from raypipe.store import Placement, Way, this_node
from raypipe.store.catalog import REPLICATE
from raypipe.store.placement import in_words
from raypipe.stream import ArraySource
from raypipe.stream.mapped import MappedRows
from raypipe.stream.reading import RowReader, Source
from raypipe.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Small and picklable. ``names``, ``placements``, ``shares``: by source; ``servers``: the actor
    handle of each node that rows are read on, by raypipe's node id; ``leases``: theirs, so that a
    worker finds why one was ended; ``server_bytes``: most that those of one machine have leased;
    ``run_turn``: the workers have not all got their memory (`raypipe.cluster.turn`).
    """

    names: Mapping[ArraySource, str]
    placements: Mapping[ArraySource, Placement]
    shares: Mapping[ArraySource, Share] = field(default_factory=dict)
    servers: Mapping[str, Any] = field(default_factory=dict)
    leases: Mapping[str, Lease] = field(default_factory=dict)
    patience: Patience = field(default_factory=Patience)
    server_bytes: int = 0
    run_turn: Any = None

    def way(self, source: ArraySource, turn: int = 0) -> Way:
        """The way from this node to a source's rows; nothing is opened."""
        placement = self.placements.get(source)
        if placement is None:  # a task that makes other sources here than on the driver
            placement = Placement.of(source.path, source.fingerprint, source.node)
        return placement.way(this_node(), turn)

    def workers_are_in(self) -> None:
        """All workers have their leases: another run may take its turn now."""
        if self.run_turn is not None:
            give_on(self.run_turn)

    def words(self, turn: int = 0) -> str:
        """The ways from this node, for people: one line; "" when all sources are plain files."""
        return in_words({name: self.way(source, turn) for source, name in self.names.items()})

    def open_rows(
        self,
        source: Source,
        *,
        turn: int,
        say: Callable[[str], None],
        stalls: Stalls | None = None,
    ) -> MappedRows | RowReader:
        """Open ``source`` the way there is from this node; ``stalls``: of this process's readers. Raises
        StoreError, WorkerFailed, and as `Source.open`.
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
        return RemoteRows(source, name, copies, share, say, self.patience, stalls)


@contextmanager
def open_shards(
    sources: Mapping[str, Source],
    *,
    batch_rows: int,
    workers: int,
    memory: WorkerMemory | None,
    say: Callable[[str], None],
    patience: Patience | None = None,
    grows: bool = True,
) -> Iterator[Shards]:
    """Find where ``sources`` lie, and keep servers on the nodes that alone have some of them.

    ``batch_rows``: of a worker's largest batch. ``grows``: nodes may come that have no copy of what
    lies on nodes' disks; where none does, what every node has needs no server. Raises MissingInput
    when no node of the cluster has a source, StoreError for a copy that is not where it is listed,
    MemoryBudgetExceeded when rows do not fit the object store or a server its node's budget, or when
    other runs held the memory for as long as was waited, WorkerFailed when a server does not start.
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
    everywhere = [s for s in far if {place.node for place in placed[s].places} >= nodes.keys()]
    far = [source for source in far if grows or source not in everywhere]
    if not far:
        yield Shards(names=names, placements=placed)
        return
    # A worker holds two rings, one to train and one to validate, and both may be full.
    readers = 2 * workers * len(far)
    room = smallest_object_store()
    shares = {source: divide(room, readers, source.row_bytes, batch_rows) for source in far}
    with serving(
        {source: placed[source] for source in far},
        names,
        shares,
        nodes=nodes,
        memory=memory,
        say=say,
    ) as found:
        say(_summary(found, shares, names, readers, room))
        yield Shards(
            names=names,
            placements=placed,
            shares=shares,
            servers=found.servers,
            leases=found.leases,
            patience=patience or Patience(),
            server_bytes=found.most_bytes,
            run_turn=found.turn,
        )


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
            f"or copy the store to one that is there ({REPLICATE})"
        )
    if absent:
        say(f"{name}: copies on {absent} are not used: not in the cluster")
    return replace(placement, places=there)


def _summary(
    found: Serving,
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
        f"row servers are ready after {found.took_s:.1f} s: rows are read on "
        f"{', '.join(found.servers)} for workers elsewhere; under way at most, for each of {readers} "
        f"readers: {each}; in all half of an object store of {format_bytes(room)}"
    )
