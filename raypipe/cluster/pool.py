"""A pool of actors that share one queue of work items.

Items are handed out as workers ask for them, so a slow worker never holds the others; the item
that a worker will probably get next is told to it beforehand, so that it can read ahead. A dead
actor's unfinished items go back to the queue and the actor is replaced, a bounded number of times.
What a worker does with an item is its own affair: see ``runner.StepWorker``.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, OutOfMemoryError, RayError, RayTaskError

from raypipe.cluster.budget import WorkerMemory, budgeted, is_younger, verdicts
from raypipe.cluster.node_memory import verdict_of
from raypipe.errors import MemoryBudgetExceeded, RaypipeError, WorkerFailed
from raypipe.memory.attend import attend
from raypipe.memory.guard import note
from raypipe.memory.verdict import Verdict
from raypipe.runner import Done, Needs, StepWorker

# A range that killed its worker this often is at fault itself.
MAX_ATTEMPTS = 3
# An autoscaled GPU node needs minutes to boot and to install; longer means that none will come.
START_TIMEOUT_S = 1200.0
SAY_WAITING_EVERY_S = 30.0
# A verdict is flushed to the disk right after the kill; a slow disk gets this long.
VERDICT_WAIT_S = 2.0


class PooledWorker:
    """The one class that becomes an actor; it holds an ordinary worker, and its budget."""

    def __init__(self) -> None:
        self._began = time.time()
        self._held = ExitStack()  # until the actor ends

    def load(
        self,
        make: Callable[[], StepWorker],
        order: WorkerMemory | None,
        name: str,
        *,
        gives_way: bool,
    ) -> tuple[int, str] | None:
        """Make the worker, under its budget; the process id, and the node's id.

        gives_way : return None instead where the node's memory actor came after this one.
        """
        if order is not None:
            guard = self._held.enter_context(budgeted(order, name))
            if gives_way and is_younger(guard, self._began):
                self._held.close()
                return None
            note(phase="load")
        self._worker = make()
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def describe(self) -> Any:
        return self._worker.describe()

    def open(self, shared: Any) -> Any:
        return self._worker.open(shared)

    def step(self, item: Any, upcoming: Any | None) -> list[Done]:
        return self._worker.step(item, upcoming)

    def drain(self) -> list[Done]:
        return self._worker.drain()


@dataclass(eq=False)
class _Seat:
    """One actor and what it holds.

    A seat is loading, then opening, then has a call under way or is idle. name : unlike any
    other's, for verdicts. ticket : what its worker's ``open`` gave, by which the driver can shut
    it out.
    """

    actor: Any
    name: str
    loading: Any | None
    pid: int = 0
    node: str = ""
    opening: Any | None = None
    ticket: Any | None = None
    call: Any | None = None
    current: Any | None = None
    reserved: Any | None = None
    unacked: dict[Any, Any] = field(default_factory=dict)


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
        self._start_timeout_s = start_timeout_s
        self._seats: list[_Seat] = []
        self._replacements_left = MAX_ATTEMPTS * needs.workers
        self._shared: Any | None = None
        self._lost: Callable[[Any], None] = lambda ticket: None
        self._deadline = 0.0
        self._attended = ExitStack()

    def __enter__(self) -> RayPool:
        if self._memory is not None:
            log = attend(self._memory.memory, self._memory.run_dir, "driver")
            self._attended.enter_context(log)
        self._restart_clock()
        self._make_ref, self._memory_ref = ray.put(self._make), ray.put(self._memory)
        self._seats = [self._seat() for _ in range(self._needs.workers)]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
                        return self._get(seat, seat.actor.describe.remote())
                    except (_Died, _WorkerError) as error:
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
            ready, _ = ray.wait(list(calls), num_returns=1, timeout=SAY_WAITING_EVERY_S)
            if not ready and not any(seat.pid for seat in self._seats):
                self._say_waiting()
            for ref in ready:
                yield from self._settle(calls[ref], queue, left, attempts)

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

    def _steal(self, thief: _Seat) -> Any | None:
        """An item that a busy worker has only been told of."""
        for seat in self._seats:
            if seat is not thief and seat.reserved is not None and seat.call is not None:
                item, seat.reserved = seat.reserved, None
                return item
        return None

    def _settle(
        self, seat: _Seat, queue: deque[Any], left: set[Any], attempts: dict[Any, int]
    ) -> Iterator[Done]:
        """Take in what one finished call says."""
        if seat.loading is not None:
            if self._finish_loading(seat):
                seat.opening = seat.actor.open.remote(self._shared)
            return
        call = seat.opening or seat.call
        try:
            result = self._get(seat, call)
        except (_Died, _WorkerError) as error:
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
        self, seat: _Seat, queue: deque[Any], attempts: dict[Any, int], error: Exception
    ) -> None:
        """Give up a worker; its items go back, the one it died of asked for less memory."""
        short_of_memory = isinstance(error, _Died) and error.out_of_memory
        if seat.ticket is not None:
            self._lost(seat.ticket)
        lost: list[Any] = [*seat.unacked.values(), *([seat.reserved] if seat.reserved else [])]
        blamed: Any = seat.current if seat.current is not None else next(iter(lost), None)
        if blamed is not None and not short_of_memory:
            attempts[blamed.key] = attempts.get(blamed.key, 0) + 1
            if attempts[blamed.key] >= MAX_ATTEMPTS:
                raise WorkerFailed(
                    f"item {blamed.key} failed {MAX_ATTEMPTS} times, last with: "
                    f"{_one_line(error)}; what was committed is kept: mend the cause and run the "
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
            f"worker {seat.pid} failed ({_one_line(error)}); its {len(lost)} unfinished item(s) "
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

    def _replace(self, seat: _Seat, error: Exception) -> None:
        if self._replacements_left == 0:
            short_of_memory = isinstance(error, _Died) and error.out_of_memory
            kind = MemoryBudgetExceeded if short_of_memory else WorkerFailed
            logs = "see Ray's worker logs (--verbose)"
            step = "free memory on that node, or give fewer --workers" if short_of_memory else logs
            raise kind(
                f"workers died {MAX_ATTEMPTS * self._needs.workers} times in a row, last with: "
                f"{_one_line(error)}; {step}, then run the same command"
            ) from error
        self._replacements_left -= 1
        ray.kill(seat.actor, no_restart=True)
        self._seats[self._seats.index(seat)] = self._seat()
        if not any(other.pid for other in self._seats):
            self._restart_clock()

    def _seat(self, *, gives_way: bool = True) -> _Seat:
        self._made += 1
        name = f"worker-{self._made}"
        gpus = 1 if self._needs.device.startswith("cuda") else 0
        actor = (
            ray.remote(PooledWorker)
            .options(num_cpus=self._needs.cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)
            .remote()
        )
        loading = actor.load.remote(self._make_ref, self._memory_ref, name, gives_way=gives_way)
        return _Seat(actor=actor, name=name, loading=loading)

    def _finish_loading(self, seat: _Seat) -> bool:
        """True when the worker stands; a death while loading is replaced like any other."""
        ref, seat.loading = seat.loading, None
        try:
            loaded = self._get(seat, ref)
        except MemoryBudgetExceeded as error:  # no lease came: the others are enough, if there are
            if not any(other.pid for other in self._seats if other is not seat):
                raise
            self._say(f"going on without one worker: {error}")
            ray.kill(seat.actor, no_restart=True)
            self._seats.remove(seat)
            return False
        except _Died as error:
            if error.verdict is not None:  # it has no batch yet that could be halved
                raise MemoryBudgetExceeded(error.verdict.message()) from error
            self._say(f"a worker died while loading ({_one_line(error)}); starting another")
            self._replace(seat, error)
            return False
        except _WorkerError as error:
            raise WorkerFailed(f"a worker could not load: {_one_line(error)}") from error
        if loaded is None:  # a node that came late: the next worker there is newer than its actor
            ray.kill(seat.actor, no_restart=True)
            self._seats[self._seats.index(seat)] = self._seat(gives_way=False)
            return False
        seat.pid, seat.node = loaded
        return True

    def _get(self, seat: _Seat, ref: Any) -> Any:
        """The call's result; raises the worker's RaypipeError, _WorkerError, _Died, WorkerFailed."""
        try:
            return ray.get(ref)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, RaypipeError):
                raise cause from None
            raise _WorkerError(f"{type(cause).__name__}: {cause}") from error
        except ActorUnschedulableError as error:
            raise WorkerFailed(f"no place for a worker: {_one_line(error)}") from error
        except RayError as error:  # the actor, its node, or an object on it is gone
            if isinstance(error, OutOfMemoryError):
                raise _Died(_one_line(error), out_of_memory=True) from error
            verdict = self._verdict(seat)
            text = verdict.message() if verdict else _one_line(error)
            raise _Died(text, out_of_memory=verdict is not None, verdict=verdict) from error

    def _verdict(self, seat: _Seat) -> Verdict | None:
        """Why the node's memory actor ended that worker, if it did; it writes that after the kill.

        The actor is asked first: a network disk may show its file late.
        """
        deadline = time.monotonic() + VERDICT_WAIT_S
        while self._memory is not None:
            told = verdict_of(seat.node, seat.pid) if seat.node else None
            if told is not None and told.label == seat.name:
                return told
            found = verdicts(self._memory, seat.name)
            if found:
                return found[-1]
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return None

    def _restart_clock(self) -> None:
        self._deadline = time.monotonic() + self._start_timeout_s

    def _say_waiting(self) -> None:
        has = ray.cluster_resources()
        text = f"the cluster has {has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs"
        if time.monotonic() > self._deadline:
            raise WorkerFailed(
                f"no worker started in {self._start_timeout_s:.0f} s; {text}: ask for fewer workers"
            )
        self._say(f"waiting for a worker to load; {text}")


class _WorkerError(Exception):
    """An exception out of a worker that is none of ours: worth another try elsewhere."""


class _Died(Exception):
    """A worker is gone. out_of_memory : Ray's memory monitor ended it, or its budget (verdict)."""

    def __init__(self, text: str, *, out_of_memory: bool, verdict: Verdict | None = None) -> None:
        super().__init__(text)
        self.out_of_memory, self.verdict = out_of_memory, verdict


def _with_less_memory(item: Any, error: Exception) -> Any:
    """``item`` at half its batch; one that is at its smallest ends the run with the verdict."""
    try:
        return item.with_less_memory()
    except MemoryBudgetExceeded as last:
        raise MemoryBudgetExceeded(f"{_one_line(error)}; last try: {last}") from error


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, (_WorkerError, _Died)):
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
