"""A pool of actors that share one queue of work items.

Items are handed out as workers ask for them, so a slow worker never holds the others; the item
that a worker will probably get next is told to it beforehand, so that it can read ahead. A dead
actor's unfinished items go back to the queue and the actor is replaced, a bounded number of times.
What a worker does with an item is its own affair: see ``runner.StepWorker``. The actor's class is
``pooled_worker``; what one actor holds, and how its calls can fail, is ``seat``.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import ray

from raypipe.cluster.awaited import Awaited, landed, memory_waits
from raypipe.cluster.budget import LEASE_WAIT_S, WorkerMemory
from raypipe.cluster.pooled_worker import PooledWorker
from raypipe.cluster.seat import Died, Seat, WorkerError, one_line
from raypipe.errors import MemoryBudgetExceeded, WorkerFailed
from raypipe.memory.attend import attend
from raypipe.runner import Done, Needs, StepWorker

# A range that killed its worker this often is at fault itself.
MAX_ATTEMPTS = 3
# An autoscaled GPU node needs minutes to boot and to install; longer means that none will come.
START_TIMEOUT_S = 1200.0
SAY_WAITING_EVERY_S = 25.0


class RayPool:
    """``needs.workers`` actors, each made by calling ``worker`` where it lands.

    memory : the workers' budgets, which their nodes enforce; None leaves them without.
    on_event : told in one line of every death and retry.
    """

    def __init__(
        self,
        worker: Callable[[], StepWorker],
        needs: Needs,
        *,
        memory: WorkerMemory | None = None,
        on_event: Callable[[str], None] = print,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self._make, self._needs, self._say = worker, needs, on_event
        self._memory = memory
        self._made = 0
        # Verdicts of earlier calls stay in the folder, and other runs have workers there.
        self._name = f"worker-{secrets.token_hex(3)}"
        self._start_timeout_s = start_timeout_s
        self._seats: list[Seat] = []
        self._replacements_left = MAX_ATTEMPTS * needs.workers
        self._shared: Any | None = None
        self._lost: Callable[[Any], None] = lambda ticket: None
        self._deadline = self._next_word = 0.0
        self._attended = ExitStack()

    def __enter__(self) -> RayPool:
        if self._memory is not None:
            log = attend(self._memory.memory, self._memory.run_dir, "driver")
            self._attended.enter_context(log)
        self._restart_clock()
        self._make_ref, self._memory_ref = ray.put(self._make), ray.put(self._memory)
        self._seats = [self._seat() for _ in range(self._needs.workers)]
        return self

    def __exit__(self, *_: object) -> None:
        for seat in self._seats:
            ray.kill(seat.actor, no_restart=True)
        self._seats = []
        self._attended.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the loaded actors."""
        return [seat.pid for seat in self._seats if seat.pid]

    def describe(self) -> Any:
        """What the first worker to have loaded says of itself."""
        while True:
            loading = [seat.loading for seat in self._seats if seat.loading is not None]
            ready, _ = ray.wait(loading, timeout=SAY_WAITING_EVERY_S)
            for seat in [seat for seat in self._seats if seat.loading in ready]:
                if self._finish_loading(seat):
                    try:
                        return seat.result(seat.actor.describe.remote())
                    except (Died, WorkerError) as error:
                        self._replace(seat, error)
            if not ready:
                self._say_waiting()

    def run(
        self,
        items: Sequence[Any],
        shared: Any,
        lost: Callable[[Any], None] = lambda ticket: None,
    ) -> Iterator[Done]:
        """Hand out ``items``; yield each once, when its worker reports it durable.

        shared : small; passed to every worker's ``open`` through the object store. lost : told what
        a given-up worker's ``open`` gave, before its items go to another: it may be alive somewhere.
        Raises the worker's own RaypipeError, or WorkerFailed after bounded retries.
        """
        self._shared, self._lost = ray.put(shared), lost
        queue, left = deque(items), {item.key for item in items}
        attempts: dict[Any, int] = {}
        self._restart_clock()
        for seat in self._seats:
            seat.opening = seat.actor.open.remote(self._shared) if seat.loading is None else None
        while left:
            self._feed(queue)
            calls = {seat.call or seat.opening or seat.loading: seat for seat in self._seats}
            calls.pop(None, None)
            timeout_s = max(0.1, self._next_word - time.monotonic())
            ready, _ = ray.wait(list(calls), num_returns=1, timeout=timeout_s)
            for ref in ready:
                yield from self._settle(calls[ref], queue, left, attempts)
            if left and time.monotonic() >= self._next_word:  # who has just come is not late
                self._say_late()

    def _feed(self, queue: deque[Any]) -> None:
        for seat in self._seats:
            if not (seat.loading is seat.opening is seat.call is None):
                continue
            item = seat.reserved or (queue.popleft() if queue else self._steal(seat))
            seat.reserved = None
            if item is not None:
                seat.reserved = queue.popleft() if queue else None
                seat.current, seat.unacked[item.key] = item, item
                seat.call = seat.actor.step.remote(item, seat.reserved)
            elif seat.unacked:
                seat.call = seat.actor.drain.remote()

    def _steal(self, thief: Seat) -> Any | None:
        """An item that a busy worker has only been told of."""
        for seat in self._seats:
            if seat is not thief and seat.reserved is not None and seat.call is not None:
                item, seat.reserved = seat.reserved, None
                return item
        return None

    def _settle(
        self, seat: Seat, queue: deque[Any], left: set[Any], attempts: dict[Any, int]
    ) -> Iterator[Done]:
        """Take in what one finished call says."""
        if seat.loading is not None:
            if self._finish_loading(seat):
                seat.opening = seat.actor.open.remote(self._shared)
            return
        call = seat.opening or seat.call
        try:
            result = seat.result(call)
        except (Died, WorkerError) as error:
            self._requeue(seat, queue, attempts, error)
            return
        if seat.opening is not None:
            seat.opening, seat.ticket = None, result
            return
        seat.call = seat.current = None
        for done in result:
            seat.unacked.pop(done.key, None)
            if done.key in left:
                left.discard(done.key)
                self._replacements_left = MAX_ATTEMPTS * self._needs.workers  # it gets on
                yield done

    def _requeue(
        self, seat: Seat, queue: deque[Any], attempts: dict[Any, int], error: Exception
    ) -> None:
        """Give up a worker; its items go back, the one it died of asked for less memory."""
        short_of_memory = isinstance(error, Died) and error.out_of_memory
        if seat.ticket is not None:
            self._lost(seat.ticket)
        lost: list[Any] = [*seat.unacked.values(), *([seat.reserved] if seat.reserved else [])]
        blamed: Any = seat.current if seat.current is not None else next(iter(lost), None)
        if blamed is not None and not short_of_memory:
            attempts[blamed.key] = attempts.get(blamed.key, 0) + 1
            if attempts[blamed.key] >= MAX_ATTEMPTS:
                raise WorkerFailed(
                    f"item {blamed.key} failed {MAX_ATTEMPTS} times, last with: "
                    f"{one_line(error)}; what was committed is kept: mend the cause and run the "
                    "same command again"
                ) from error
        again = [item.again() for item in lost]
        if short_of_memory and blamed is not None:
            again[lost.index(blamed)] = smaller = _with_less_memory(blamed, error)
            again = [item.at_most(smaller) for item in again]
            self._replacements_left += 1  # this death is bounded by the halving
            self._limit_others(smaller, queue)
        queue.extendleft(reversed(again))
        self._say(
            f"worker {seat.pid} failed ({one_line(error)}); its {len(lost)} unfinished item(s) "
            "go to others"
        )
        self._replace(seat, error)

    def _limit_others(self, smaller: Any, queue: deque[Any]) -> None:
        """What was too much once would be too much for every item: a worker's death each."""
        for index, item in enumerate(queue):
            queue[index] = item.at_most(smaller)
        for seat in self._seats:
            if seat.reserved is not None:
                seat.reserved = seat.reserved.at_most(smaller)

    def _replace(self, seat: Seat, error: Exception) -> None:
        if self._replacements_left == 0:
            short_of_memory = isinstance(error, Died) and error.out_of_memory
            kind = MemoryBudgetExceeded if short_of_memory else WorkerFailed
            logs = "see Ray's worker logs (--verbose)"
            step = "free memory on that node, or give fewer --workers" if short_of_memory else logs
            raise kind(
                f"workers died {MAX_ATTEMPTS * self._needs.workers} times in a row, last with: "
                f"{one_line(error)}; {step}, then run the same command"
            ) from error
        self._replacements_left -= 1
        ray.kill(seat.actor, no_restart=True)
        self._seats[self._seats.index(seat)] = self._seat()
        if not any(other.pid for other in self._seats):
            self._restart_clock()

    def _seat(self, *, gives_way: bool = True) -> Seat:
        self._made += 1
        name = f"{self._name}-{self._made}"
        gpus = 1 if self._needs.device.startswith("cuda") else 0
        actor = (
            ray.remote(PooledWorker)
            .options(num_cpus=self._needs.cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)
            .remote()
        )
        where = actor.where.remote()  # answered first
        loading = actor.load.remote(self._make_ref, self._memory_ref, name, gives_way=gives_way)
        return Seat(actor=actor, name=name, memory=self._memory, loading=loading, where=where)

    def _finish_loading(self, seat: Seat) -> bool:
        """True when the worker stands; a death while loading is replaced like any other."""
        ref, seat.loading = seat.loading, None
        try:
            loaded = seat.result(ref)
        except MemoryBudgetExceeded as error:  # no lease came: the others are enough, if there are
            if not any(other.pid for other in self._seats if other is not seat):
                raise
            self._say(f"going on without one worker: {error}")
            ray.kill(seat.actor, no_restart=True)
            self._seats.remove(seat)
            return False
        except Died as error:
            if error.verdict is not None:  # it has no batch yet that could be halved
                raise MemoryBudgetExceeded(error.verdict.message()) from error
            self._say(f"a worker died while loading ({one_line(error)}); starting another")
            self._replace(seat, error)
            return False
        except WorkerError as error:
            raise WorkerFailed(f"a worker could not load: {one_line(error)}") from error
        if loaded is None:  # a node that came late: the next worker there is newer than its actor
            ray.kill(seat.actor, no_restart=True)
            self._seats[self._seats.index(seat)] = self._seat(gives_way=False)
            return False
        seat.pid, seat.node = loaded
        return True

    def _restart_clock(self) -> None:
        now = time.monotonic()
        self._deadline, self._next_word = now + self._start_timeout_s, now + SAY_WAITING_EVERY_S

    def _say_late(self) -> None:
        """Of workers that do not come: all of them, or some while others work."""
        self._next_word = time.monotonic() + SAY_WAITING_EVERY_S
        if not any(seat.pid for seat in self._seats):
            self._say_waiting()
        elif waits := self._memory_waits():
            self._say(waits)

    def _memory_waits(self) -> str:
        """Who holds the memory that workers wait for; "" when none does."""
        if self._memory is None:
            return ""
        late = {s.name: s for s in self._seats if s.loading is not None}
        spots = {name: spot for name, s in late.items() if (spot := landed(s.where)) is not None}
        awaited = [
            Awaited(
                who=f"{name} on node {spot.name}",
                label=name,
                ray_node=spot.ray_node,
                ends_s=LEASE_WAIT_S,
            )
            for name, spot in spots.items()
        ]
        first, *others = [*memory_waits(awaited).items()] or [("", "")]
        nodes = ", ".join(sorted({spots[name].name for name, _ in others}))
        return f"{first[1]}; {len(others)} more wait for theirs on {nodes}" if others else first[1]

    def _say_waiting(self) -> None:
        has = ray.cluster_resources()
        text = f"the cluster has {has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs"
        nowhere = sum(
            seat.loading is not None and landed(seat.where) is None for seat in self._seats
        )
        if nowhere:
            text += f", {nowhere} of {len(self._seats)} worker(s) have no place there yet"
        if waits := self._memory_waits():
            text += f"; {waits}"
        if time.monotonic() > self._deadline:
            raise WorkerFailed(
                f"no worker started in {self._start_timeout_s:.0f} s; {text}; ask for fewer workers"
            )
        self._say(f"waiting for a worker to load; {text}")


def _with_less_memory(item: Any, error: Exception) -> Any:
    """``item`` at half its batch; one that is at its smallest ends the run with the verdict."""
    try:
        return item.with_less_memory()
    except MemoryBudgetExceeded as last:
        raise MemoryBudgetExceeded(f"{one_line(error)}; last try: {last}") from error
