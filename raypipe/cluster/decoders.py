"""Images decoded by actors, for Train workers that train without a store.

A training worker's `Decoders` hands each batch's rows out in parts; every actor decodes its part and
puts it into the object store, from where the worker's gatherer takes it. What is under way is bounded
by the gatherer's ring: it asks for as many batches as it has room for, and a part leaves the object
store when it was copied. An actor is a `PixelSource` with a process and a lease around it
(`decode_actor`): here is how many there are, who does what, and what happens when one dies. One that
was ended for its memory is made once more with as much as any process of the run may have.
"""

from __future__ import annotations

import itertools
import logging
import math
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from raypipe.cluster.budget import WorkerMemory, verdicts
from raypipe.cluster.decode_actor import DecodeActor, Lease, budget_bytes
from raypipe.errors import MemoryBudgetExceeded, RaypipeError, WorkerFailed
from raypipe.memory.config import MemoryConfig
from raypipe.memory.limits import NodeLimits
from raypipe.stream.mapped import MappedRows
from raypipe.stream.pixels import MOST_THREADS, PixelSource
from raypipe.stream.reading import OpenRows, RowReader, Source

logger = logging.getLogger(__name__)

# A part whose actor died goes to a new one this often; what kills every actor is not bad luck.
MAX_TRIES = 4
# A part that is this late is named; after the second time the run ends and says so.
SAY_STALLED_S = 30.0
STALLED_S = 300.0
# Of the CPUs that the Train workers leave: Ray Data's descriptors need a little too.
SHARE = 0.8
# Of a node's memory, unless --decode-threads says how many there are.
ROOM = 0.25


@dataclass
class _Part:
    """Some rows of a batch with one actor: ``lo`` to ``hi`` of the batch."""

    lo: int
    hi: int
    place: int
    seat: _Seat
    ref: Any


@dataclass(frozen=True)
class _Seat:
    """An actor; ``label``: in verdicts; ``most``: it has the largest lease there is for it."""

    actor: Any
    label: str
    most: bool


@dataclass(frozen=True)
class Share:
    """Decode actors of one training worker, the CPUs of each, and its budget."""

    count: int
    cpus: float
    budget_bytes: int = sys.maxsize


class Decoders:
    """`raypipe.stream.reading.RowReader` by the actors of ``share``.

    memory : of the run; None: nobody watches the actors. name : of them, in logs and verdicts.
    """

    def __init__(
        self,
        source: PixelSource,
        share: Share,
        *,
        memory: WorkerMemory | None = None,
        name: str = "decoder",
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        self.source, self._share, self._say = source, share, say
        self._memory, self._name = memory, name
        self._where = ray.put(source)
        self._lock = threading.Lock()
        self._made = itertools.count()
        self._seats = [self._new_seat() for _ in range(share.count)]
        self._turn = 0
        weakref.finalize(self, _end, self._seats)

    @property
    def actors(self) -> list[Any]:
        """The actors' handles, for tests."""
        return [seat.actor for seat in self._seats]

    def check(self, rows: np.ndarray) -> None:
        """Raise ConfigError for rows that are not there."""
        self.source.check(rows)

    def start(self, rows: np.ndarray) -> Callable[[], np.ndarray]:
        """Hand ``rows`` out; the call waits, and gives (n, height, width, 3) uint8.

        It raises what an actor raised, and WorkerFailed when actors die or stall again and again.
        """
        count = min(len(self._seats), len(rows))
        cuts = [len(rows) * i // count for i in range(count + 1)]
        parts = [self._hand_out(rows, lo, hi) for lo, hi in pairwise(cuts)]

        def wait() -> np.ndarray:
            pixels = np.empty((len(rows), *self.source.row_shape), np.uint8)
            while parts:  # each leaves the object store as soon as it is copied
                part = parts.pop(0)
                pixels[part.lo : part.hi] = self._take(part, rows[part.lo : part.hi])
            return pixels

        return wait

    def _hand_out(self, rows: np.ndarray, lo: int, hi: int) -> _Part:
        with self._lock:
            place = self._turn = (self._turn + 1) % len(self._seats)
            seat = self._seats[place]
        return _Part(lo, hi, place, seat, seat.actor.decode.remote(rows[lo:hi]))

    def _take(self, part: _Part, rows: np.ndarray) -> np.ndarray:
        """The part's pixels, by another actor when its own died."""
        for _ in range(MAX_TRIES):
            try:
                return self._get(part, rows)
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, RaypipeError):
                    raise cause from None  # Ray's own text would hide which image it was
                raise
            except (RayActorError, ObjectLostError) as error:  # or its node, with what it had made
                first = str(error).strip().splitlines()[0]
                part.seat = self._replaced(part, first, rows)
                part.ref = part.seat.actor.decode.remote(rows)
        raise WorkerFailed(
            f"decode actors died {MAX_TRIES} times with images {self._names(rows)}; if the system "
            "ended them for memory give fewer --decode-threads, otherwise look at these images"
        )

    def _get(self, part: _Part, rows: np.ndarray) -> np.ndarray:
        waited = 0.0
        while True:
            try:
                return ray.get(part.ref, timeout=SAY_STALLED_S)
            except GetTimeoutError:
                waited += SAY_STALLED_S
                text = (
                    f"a decode actor has given nothing for {waited:.0f} s, of images "
                    f"{self._names(rows)}: its disk is slow, or the cluster has no CPU free for it"
                )
                if waited >= STALLED_S:
                    raise WorkerFailed(
                        f"{text}; look at --data-dir there, or give fewer --decode-threads"
                    ) from None
                self._say(text)

    def _replaced(self, part: _Part, why: str, rows: np.ndarray) -> _Seat:
        """The actor at the part's place, a new one if it is still the dead one."""
        with self._lock:
            dead = self._seats[part.place]
            if dead is part.seat:
                ended = verdicts(self._memory, dead.label)
                if ended and dead.most:
                    raise MemoryBudgetExceeded(
                        f"one of the images {self._names(rows)} takes more memory than a process may "
                        f"have: {ended[-1].message()}; or make that image smaller"
                    )
                self._say(f"a decode actor died ({why}); a new one takes its place")
                self._seats[part.place] = self._new_seat(most=bool(ended) or dead.most)
            return self._seats[part.place]

    def _new_seat(self, *, most: bool = False) -> _Seat:
        label = f"{self._name}-{next(self._made)}"
        lease = None
        if self._memory is not None:
            first, limit = self._share.budget_bytes, self._memory.memory.config.budget_bytes
            lease = Lease(
                order=self._memory,
                label=label,
                budget_bytes=limit if most else min(first, limit),
                least_bytes=min(2 * first, limit) if most else None,
            )
            most = most or first >= limit
        # Spread: decoding is what CPU nodes can do for GPU nodes.
        make = ray.remote(DecodeActor).options(
            num_cpus=self._share.cpus, scheduling_strategy="SPREAD", max_restarts=0
        )
        return _Seat(make.remote(self._where, lease), label, most)

    def _names(self, rows: np.ndarray) -> str:
        return f"{self.source.names[int(rows[0])]} to {self.source.names[int(rows[-1])]}"


def _end(seats: list[_Seat]) -> None:
    if ray.is_initialized():
        for seat in seats:
            ray.kill(seat.actor)


def decoder_share(
    free_cpus: float,
    world: int,
    wanted: int | None,
    budget: Callable[[int], int] = lambda count: 0,
    room_bytes: int = sys.maxsize,
) -> Share:
    """How ``world`` training workers share the CPUs that they leave free; ``wanted``: actors each.

    One actor a whole CPU, at most `MOST_THREADS`; with less than one CPU a worker, a part of it.
    Fewer where all of them would take more than ``room_bytes``: ``budget`` of one of so many.
    """
    mine = max(0.01, SHARE * free_cpus / world)
    count = wanted or max(1, min(MOST_THREADS, int(mine)))
    while wanted is None and count > 1 and world * count * budget(count) > room_bytes:
        count -= 1
    return Share(count, min(1.0, mine / count), budget(count))


def plan_decoders(
    sources: Iterable[Source],
    *,
    world: int,
    cpus: float,
    batch_rows: int,
    config: MemoryConfig,
    limits: NodeLimits,
) -> dict[str, Share]:
    """By fingerprint, the share of each source of images for one of ``world`` workers.

    cpus : that each worker has for itself. batch_rows : of its largest batch. limits : of a node,
    whose memory is the workers' but for a quarter.
    """
    images = {source.fingerprint: source for source in sources if isinstance(source, PixelSource)}
    shares: dict[str, Share] = {}
    for fingerprint, source in images.items():
        free = float(ray.cluster_resources().get("CPU", 1.0)) - cpus * world
        room = int(ROOM * config.capacity_bytes(limits) / len(images))

        def budget(count: int, source: PixelSource = source) -> int:
            return budget_bytes(source, math.ceil(batch_rows / count), config.budget_bytes)

        shares[fingerprint] = decoder_share(free / len(images), world, source.readers, budget, room)
    return shares


def bytes_on_a_machine(shares: Mapping[str, Share], world: int) -> int:
    """The leases of all decoders that may land on one machine, as Ray spreads them over its nodes."""
    nodes = Counter(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
    part = max(nodes.values(), default=1) / max(1, nodes.total())
    return sum(math.ceil(world * s.count * part) * s.budget_bytes for s in shares.values())


class RowOpener:
    """How a Train worker opens sources (`WorkerContext.open_rows`): images by actors, which training
    and validation share; everything else by ``otherwise``, or as it opens itself.

    shares : of this worker, by fingerprint, see `plan_decoders`. name : of its decoders.
    """

    def __init__(
        self,
        shares: Mapping[str, Share],
        memory: WorkerMemory | None = None,
        *,
        name: str = "decoder",
        say: Callable[[str], None] = logger.warning,
        otherwise: OpenRows | None = None,
    ) -> None:
        self._shares, self._memory, self._name, self._say = shares, memory, name, say
        self._otherwise = otherwise
        self._open: dict[str, Decoders] = {}

    def __call__(self, source: Source) -> MappedRows | RowReader:
        """Raises WorkerFailed for images that the driver did not know of; and as `Source.open`."""
        if not isinstance(source, PixelSource):
            return self._otherwise(source) if self._otherwise else source.open()
        if source.fingerprint not in self._shares:
            raise WorkerFailed(
                f"{source.path}: these images are not those that the driver planned decoders for; the "
                "task's sources() must be the same there as on the workers"
            )
        if source.fingerprint not in self._open:
            share = self._shares[source.fingerprint]
            name = f"{self._name}-{len(self._open)}"
            self._open[source.fingerprint] = Decoders(
                source, share, memory=self._memory, name=name, say=self._say
            )
        return self._open[source.fingerprint]
