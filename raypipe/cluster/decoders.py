"""Images decoded by actors, for Train workers that train without a store.

A training worker's `Decoders` hands each batch's rows out in parts (`pieces`); every actor decodes its
part and puts it into the object store, from where the worker's gatherer takes it. What is under way is
bounded by the gatherer's ring, and by a quarter of the object store. An actor is a `Decoded` source with
a process and a lease around it (`decode_actor`), how many there are is `decode_plan`'s: here is who
does what, and what happens when one dies. One that was ended for its memory is made once more with
twice as much, up to what any process of the run may have. One that has no CPU or no lease yet gets
nothing to do while there are others.
"""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayError, RayTaskError

from raypipe.cluster.awaited import Awaited, landed, memory_waits
from raypipe.cluster.budget import WorkerMemory, await_verdict
from raypipe.cluster.decode_actor import DecodeActor, Lease
from raypipe.cluster.decode_plan import Crew
from raypipe.cluster.lost import ACTOR_LOST
from raypipe.cluster.pieces import Pieces, Request
from raypipe.cluster.stalls import Stalls
from raypipe.errors import MemoryBudgetExceeded, RaypipeError, WorkerFailed
from raypipe.memory.verdict import Verdict
from raypipe.stream.decoding import Decoded, Terms
from raypipe.stream.mapped import MappedRows
from raypipe.stream.reading import OpenRows, RowReader, Source

logger = logging.getLogger(__name__)

# A part whose actor died goes to a new one this often; what kills every actor is not bad luck.
MAX_TRIES = 4
# Seconds that a part is waited for: it is named each time the first have passed; the second end the run.
SAY_STALLED_S = 25.0
STALLED_S = 300.0
LOOK_S = 1.0
VERDICT_WAIT_S = 2.0


@dataclass
class _Part:
    """Rows of a batch with the actor at ``place``."""

    rows: np.ndarray
    place: int
    seat: _Seat
    ref: Any


@dataclass
class _Seat:
    """An actor; ``label``: in verdicts; ``budget_bytes``: of its lease; ``where``: its first answer;
    ``ready``: its answer when it has its lease.
    """

    actor: Any
    label: str
    budget_bytes: int
    where: Any
    ready: Any
    _up: bool = False

    def up(self) -> bool:
        """Whether it has its CPU and its lease."""
        if not self._up and ray.wait([self.ready], timeout=0)[0]:
            try:
                ray.get(self.ready)
                self._up = True
            except RayError:  # without a lease: it asks again; a dead one is found by its part
                self.ready = self.actor.ready.remote()
        return self._up


class Decoders:
    """`raypipe.stream.reading.RowReader` by the actors of ``crew``.

    memory : of the run; None: nobody watches the actors. name : of them, in logs and verdicts.
    stalls : readers of other sources, which are looked after while an actor is waited for. Decoders are
    not of these: one is named while it is waited for itself.
    """

    names_itself = True

    def __init__(
        self,
        source: Decoded,
        crew: Crew,
        *,
        memory: WorkerMemory | None = None,
        name: str = "decoder",
        say: Callable[[str], None] = logger.warning,
        stalls: Stalls | None = None,
    ) -> None:
        self._stalls = stalls if stalls is not None else Stalls()
        self.source, self._crew, self._say = source, crew, say
        self._memory, self._name = memory, name
        self._most_bytes = memory.memory.config.budget_bytes if memory else sys.maxsize
        self._where = ray.put(source)
        self._lock = threading.Lock()
        self._made = itertools.count()
        self._seats = [self._new_seat(crew.budget_bytes) for _ in range(crew.count)]
        self._turn = 0
        self._pieces = Pieces(
            crew.under_way, source.row_shape, self._ask, self._take, source.stored_dtype
        )
        weakref.finalize(self, _end, self._seats)

    @property
    def actors(self) -> list[Any]:
        """The actors' handles, for tests."""
        return [seat.actor for seat in self._seats]

    def check(self, rows: np.ndarray) -> None:
        """Raise ConfigError for rows that are not there."""
        self.source.check(rows)

    def start(self, rows: np.ndarray) -> Request:
        """Hand ``rows`` out as far as the share allows; the call waits, and gives
        (n, *row_shape).

        It raises what an actor raised, MemoryBudgetExceeded for an image that the largest budget
        does not hold, and WorkerFailed when actors die or stall again and again.
        """
        return self._pieces.start(rows)

    def _ask(self, rows: np.ndarray) -> _Part:
        with self._lock:
            place = self._turn = self._next()
            seat = self._seats[place]
        return _Part(rows, place, seat, seat.actor.decode.remote(rows))

    def _next(self) -> int:
        """The place after the last one whose actor is up; of any, while none is."""
        after = [(self._turn + k) % len(self._seats) for k in range(1, len(self._seats) + 1)]
        return next((place for place in after if self._seats[place].up()), after[0])

    def _take(self, part: _Part, request: Request) -> np.ndarray:
        """The part's pixels, by another actor when its own died."""
        died = 0
        while died < MAX_TRIES:
            try:
                return self._get(part, request)
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, MemoryBudgetExceeded):
                    raise MemoryBudgetExceeded(
                        f"decoding {self._names(part.rows)}: {cause}"
                    ) from None
                if isinstance(cause, RaypipeError):
                    raise cause from None  # Ray's own text would hide which image it was
                raise
            except (*ACTOR_LOST, ObjectLostError) as error:  # or its node, with what it had made
                first = str(error).strip().splitlines()[0]
                # Written after the kill, so it may come late; not under the lock, which others need.
                verdict = await_verdict(self._memory, part.seat.label, VERDICT_WAIT_S)
                died += verdict is None  # of those, a larger budget is the end
                part.seat = self._replaced(part, first, verdict)
                part.ref = part.seat.actor.decode.remote(part.rows)
        raise WorkerFailed(
            f"decode actors died {MAX_TRIES} times with {self._names(part.rows)}; if the system ended "
            f"them for memory give fewer {self._terms.readers}, otherwise look at these {self._terms.row}s"
        )

    def _get(self, part: _Part, request: Request) -> np.ndarray:
        began, next_word = time.monotonic(), SAY_STALLED_S
        while True:
            request.raise_cancelled()
            ready, _ = ray.wait([part.ref], timeout=min(LOOK_S, SAY_STALLED_S))
            if ready:
                return ray.get(part.ref)
            self._hand_on(part)
            self._stalls.look()
            waited = time.monotonic() - began
            if waited < min(STALLED_S, next_word):
                continue
            text = (
                f"a decode actor has given nothing for {waited:.0f} s, of "
                f"{self._names(part.rows)}: {self._why(part.seat)}"
            )
            if waited >= STALLED_S:
                others = f"; {late}" if (late := self._stalls.all_late()) else ""
                raise WorkerFailed(
                    f"{text}{others}; look at {self._terms.data} there, or give fewer "
                    f"{self._terms.readers}"
                )
            self._say(text)
            next_word += SAY_STALLED_S

    def _why(self, seat: _Seat) -> str:
        """What an actor that gives nothing waits for."""
        with self._lock:
            if seat.up():
                return "its disk is slow"
        spot = landed(seat.where)
        if spot is None:
            return "the cluster has no CPU free for it"
        who = f"{seat.label} on node {spot.name}"
        waits = memory_waits([Awaited(who=who, label=seat.label, ray_node=spot.ray_node)])
        return waits.get(seat.label, f"{who} starts")

    def _hand_on(self, part: _Part) -> None:
        """To an actor that is up, from one that is not: its rows are not begun."""
        with self._lock:
            if part.seat.up():
                return
            place = self._next()
            if self._seats[place].up():
                self._turn, part.place, part.seat = place, place, self._seats[place]
                part.ref = part.seat.actor.decode.remote(part.rows)

    def _replaced(self, part: _Part, why: str, verdict: Verdict | None) -> _Seat:
        """The actor at the part's place, a new one if it is still the dead one: with twice the budget
        where that one was ended for its memory.
        """
        with self._lock:
            dead = self._seats[part.place]
            if dead is part.seat:
                if verdict is not None and dead.budget_bytes >= self._most_bytes:
                    raise MemoryBudgetExceeded(
                        f"one of the {self._names(part.rows)} takes more memory than a process may "
                        f"have: {verdict.message()}; or make that {self._terms.row} smaller"
                    )
                self._say(f"a decode actor died ({why}); a new one takes its place")
                more = 1 if verdict is None else 2
                self._seats[part.place] = self._new_seat(more * dead.budget_bytes)
            return self._seats[part.place]

    def _new_seat(self, budget_bytes: int) -> _Seat:
        label, lease = f"{self._name}-{next(self._made)}", None
        budget_bytes = min(budget_bytes, self._most_bytes)
        if self._memory is not None:
            lease = Lease(order=self._memory, label=label, budget_bytes=budget_bytes)
        # Spread: decoding is what CPU nodes can do for GPU nodes.
        make = ray.remote(DecodeActor).options(
            num_cpus=self._crew.cpus, scheduling_strategy="SPREAD", max_restarts=0
        )
        actor = make.remote(self._where, lease)
        return _Seat(actor, label, budget_bytes, actor.where.remote(), actor.ready.remote())

    def _names(self, rows: np.ndarray) -> str:
        """``images a.png to b.png``."""
        first, last = (self.source.name_of(int(row)) for row in (rows[0], rows[-1]))
        return f"{self._terms.row}s {first} to {last}"

    @property
    def _terms(self) -> Terms:
        return self.source.terms


def _end(seats: list[_Seat]) -> None:
    if ray.is_initialized():
        for seat in seats:
            ray.kill(seat.actor)


class RowOpener:
    """How a Train worker opens sources (`WorkerContext.open_rows`): images by actors, which training
    and validation share; everything else by ``otherwise``, or as it opens itself.

    crews : of this worker, by fingerprint, see `plan_decoders`. name : of its decoders.
    """

    def __init__(
        self,
        crews: Mapping[str, Crew],
        memory: WorkerMemory | None = None,
        *,
        name: str = "decoder",
        say: Callable[[str], None] = logger.warning,
        otherwise: OpenRows | None = None,
        stalls: Stalls | None = None,
    ) -> None:
        self._crews, self._memory, self._name, self._say = crews, memory, name, say
        self._otherwise, self._stalls = otherwise, stalls
        self._open: dict[str, Decoders] = {}

    def __call__(self, source: Source) -> MappedRows | RowReader:
        """Raises WorkerFailed for images that the driver did not know of; and as `Source.open`."""
        if not isinstance(source, Decoded):
            return self._otherwise(source) if self._otherwise else source.open()
        if source.fingerprint not in self._crews:
            raise WorkerFailed(
                f"{source.path}: these {source.terms.row}s are not those that the driver planned decoders "
                "for; the task's sources() must be the same there as on the workers"
            )
        if source.fingerprint not in self._open:
            crew = self._crews[source.fingerprint]
            name = f"{self._name}-{len(self._open)}"
            self._open[source.fingerprint] = Decoders(
                source, crew, memory=self._memory, name=name, say=self._say, stalls=self._stalls
            )
        return self._open[source.fingerprint]
