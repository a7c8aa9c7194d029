"""How many processes decode images for a run's workers, and what each of them may hold.

Pure but for two looks at the cluster: its CPUs, its smallest object store. Who makes the processes is
`decoders`.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import ray

from raypipe.cluster.decode_actor import budget_bytes
from raypipe.cluster.pieces import Share, divide, smallest_object_store
from raypipe.memory.config import MemoryConfig
from raypipe.memory.limits import NodeLimits
from raypipe.stream.decoding import MOST_THREADS, Decoded
from raypipe.stream.reading import Source

# Of the CPUs that the Train workers leave: Ray Data's descriptors need a little too.
SHARE = 0.8
# Of a node's memory, unless an option says how many there are.
ROOM = 0.25


@dataclass(frozen=True)
class Crew:
    """Decode actors of one training worker, the CPUs of each, what they may have under way, and the
    budget of each.
    """

    count: int
    cpus: float
    under_way: Share
    budget_bytes: int = sys.maxsize


def decoders_each(
    free_cpus: float,
    world: int,
    wanted: int | None,
    budget: Callable[[int], int] = lambda count: 0,
    room_bytes: int = sys.maxsize,
    part: float = 1.0,
) -> tuple[int, float]:
    """How many decoders each of ``world`` training workers has, of the CPUs that they leave free, and
    the CPUs of each decoder; ``wanted``: as many.

    One a whole CPU, at most `MOST_THREADS`; with less than one CPU a worker, a part of it. Fewer
    where those on one machine, ``part`` of all, would take more than ``room_bytes``: ``budget`` of one
    of so many.
    """
    mine = max(0.01, SHARE * free_cpus / world)
    count = wanted or max(1, min(MOST_THREADS, int(mine)))
    while (
        wanted is None
        and count > 1
        and math.ceil(part * world * count) * budget(count) > room_bytes
    ):
        count -= 1
    return count, min(1.0, mine / count)


def plan_decoders(
    sources: Iterable[Source],
    *,
    world: int,
    cpus: float,
    batch_rows: int,
    config: MemoryConfig,
    limits: NodeLimits,
) -> dict[str, Crew]:
    """By fingerprint, who decodes each source of images for one of ``world`` workers.

    cpus : that each worker has for itself. batch_rows : of its largest batch. limits : of a node,
    whose memory is the workers' but for a quarter. Raises MemoryBudgetExceeded when an image does
    not fit the object store.
    """
    images = {source.fingerprint: source for source in sources if isinstance(source, Decoded)}
    return {
        fingerprint: _crew(source, len(images), world, cpus, batch_rows, config, limits)
        for fingerprint, source in images.items()
    }


def _crew(
    source: Decoded,
    sources: int,
    world: int,
    cpus: float,
    batch_rows: int,
    config: MemoryConfig,
    limits: NodeLimits,
) -> Crew:
    # A quarter of an object store: half may hold rows from other nodes. A worker has two rings.
    store, readers = smallest_object_store() // 2, 2 * world * sources

    def under_way(count: int) -> Share:
        instead = source.terms.smaller
        return divide(store, readers, source.row_bytes, batch_rows, makers=count, instead=instead)

    def budget(count: int) -> int:
        return budget_bytes(source, under_way(count).piece_rows, config.budget_bytes)

    free = float(ray.cluster_resources().get("CPU", 1.0)) - cpus * world
    room = int(ROOM * config.capacity_bytes(limits) / sources)
    count, each = decoders_each(free / sources, world, source.readers, budget, room, _part())
    return Crew(count, each, under_way(count), budget(count))


def bytes_on_a_machine(crews: Mapping[str, Crew], world: int) -> int:
    """The leases of all decoders that may land on one machine, as Ray spreads them over its nodes."""
    part = _part()
    return sum(math.ceil(world * c.count * part) * c.budget_bytes for c in crews.values())


def _part() -> float:
    """Of actors that Ray spreads over nodes with CPUs, those on the machine that gets most."""
    nodes = Counter(
        node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) > 0
    )
    return max(nodes.values(), default=1) / max(1, nodes.total())
