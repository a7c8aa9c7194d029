"""Images decoded by actors, for Train workers that train without a store.

A training worker's `Decoders` hands each batch's rows out in parts; every actor decodes its part and
puts it into the object store, from where the worker's gatherer takes it. What is under way is bounded
by the gatherer's ring: it asks for as many batches as it has room for, and a part leaves the object
store when it was copied. An actor is a `PixelSource` with a process around it: the decoding is
`raypipe.stream.pixels`'s, here is who does it where, and what happens when one dies.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from raypipe.errors import RaypipeError, WorkerFailed
from raypipe.memory.attend import attend
from raypipe.memory.config import ResolvedMemory
from raypipe.memory.guard import current, note
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


class DecodeActor:
    """Decodes rows of one source; an ordinary class, wrapped by `Decoders`."""

    def __init__(
        self, source: PixelSource, memory: ResolvedMemory | None, run_dir: Path | None
    ) -> None:
        self._source = source
        self._attended = None
        if memory is not None:
            self._attended = attend(memory, run_dir, f"decoder-{os.getpid()}")
            self._attended.__enter__()
            note(phase="decode")

    def decode(self, rows: np.ndarray) -> np.ndarray:
        """(n, height, width, 3) uint8; raises as `PixelSource.decode_row`, and MemoryBudgetExceeded
        when this process has outgrown its budget, as it sees it itself: between two parts.
        """
        pixels = self._source.decode_rows(rows)
        current().pressure()
        return pixels

    def pid(self) -> int:
        """This process."""
        return os.getpid()


@dataclass
class _Part:
    """Some rows of a batch with one actor: ``lo`` to ``hi`` of the batch."""

    lo: int
    hi: int
    seat: int
    actor: Any
    ref: Any


class Decoders:
    """`raypipe.stream.reading.RowReader` by ``count`` actors of ``cpus`` CPUs each."""

    def __init__(
        self,
        source: PixelSource,
        count: int,
        cpus: float,
        *,
        memory: ResolvedMemory | None = None,
        run_dir: Path | None = None,
        say: Callable[[str], None] = logger.warning,
    ) -> None:
        self.source, self._say = source, say
        self._args = (ray.put(source), memory, run_dir)
        # Spread: decoding is what CPU nodes can do for GPU nodes.
        options = {"num_cpus": cpus, "scheduling_strategy": "SPREAD", "max_restarts": 0}
        self._make = ray.remote(DecodeActor).options(**options).remote
        self._lock = threading.Lock()
        self._seats = [self._make(*self._args) for _ in range(count)]
        self._turn = 0
        weakref.finalize(self, _end, self._seats)

    @property
    def actors(self) -> list[Any]:
        """The actors' handles, for tests."""
        return list(self._seats)

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
            seat = self._turn = (self._turn + 1) % len(self._seats)
            actor = self._seats[seat]
        return _Part(lo, hi, seat, actor, actor.decode.remote(rows[lo:hi]))

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
                self._say(f"a decode actor died ({first}); a new one takes its place")
                part.actor = self._replaced(part.seat, part.actor)
                part.ref = part.actor.decode.remote(rows)
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

    def _replaced(self, seat: int, dead: Any) -> Any:
        """The actor in ``seat``, a new one if it is still the dead one."""
        with self._lock:
            if self._seats[seat] is dead:
                self._seats[seat] = self._make(*self._args)
            return self._seats[seat]

    def _names(self, rows: np.ndarray) -> str:
        return f"{self.source.names[int(rows[0])]} to {self.source.names[int(rows[-1])]}"


def _end(actors: list[Any]) -> None:
    if ray.is_initialized():
        for actor in actors:
            ray.kill(actor)


@dataclass(frozen=True)
class Share:
    """Decode actors of one training worker, and the CPUs of each."""

    count: int
    cpus: float


def decoder_share(free_cpus: float, world: int, wanted: int | None) -> Share:
    """How ``world`` training workers share the CPUs that they leave free; ``wanted``: actors each.

    One actor a whole CPU, at most `MOST_THREADS`; with less than one CPU a worker, a part of it.
    """
    mine = max(0.01, SHARE * free_cpus / world)
    count = wanted or max(1, min(MOST_THREADS, int(mine)))
    return Share(count, min(1.0, mine / count))


class RowOpener:
    """How a Train worker opens sources (`WorkerContext.open_rows`): images by actors, which training
    and validation share; everything else by ``otherwise``, or as it opens itself.

    cpus : that each of ``world`` workers has for itself.
    """

    def __init__(
        self,
        world: int,
        cpus: float,
        memory: ResolvedMemory | None = None,
        run_dir: Path | None = None,
        say: Callable[[str], None] = logger.warning,
        otherwise: OpenRows | None = None,
    ) -> None:
        self._world, self._cpus, self._say = world, cpus, say
        self._memory, self._run_dir = memory, run_dir
        self._otherwise = otherwise
        self._open: dict[str, Decoders] = {}

    def __call__(self, source: Source) -> MappedRows | RowReader:
        if not isinstance(source, PixelSource):
            return self._otherwise(source) if self._otherwise else source.open()
        if source.fingerprint not in self._open:
            all_cpus = float(ray.cluster_resources().get("CPU", 1.0))
            free = all_cpus - self._cpus * self._world
            share = decoder_share(free, self._world, source.readers)
            self._open[source.fingerprint] = Decoders(
                source,
                share.count,
                share.cpus,
                memory=self._memory,
                run_dir=self._run_dir,
                say=self._say,
            )
        return self._open[source.fingerprint]


def own_cpus() -> float:
    """What Ray gave this worker."""
    return float(ray.get_runtime_context().get_assigned_resources().get("CPU", 0.0))
