"""A process under its node's memory actor: how it joins, is watched, and leaves.

It joins for the length of a block: it waits for its lease, is watched, and brings the actor
(``node_memory``) back within two seconds should that ever die. Where that cannot be, it keeps its
budget by itself. What a worker's budget is, and that it joins, is ``budget``.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ray
from ray.exceptions import GetTimeoutError

from raypipe.cluster.lost import ACTOR_LOST
from raypipe.cluster.node_memory import CALL_TIMEOUT_S, NAMESPACE, START_TIMEOUT_S, actor_name, call
from raypipe.errors import ConfigError, MemoryBudgetExceeded, WorkerFailed
from raypipe.memory.guard import InProcessGuard
from raypipe.memory.node import Answer
from raypipe.memory.policy import Limits
from raypipe.memory.probe import ProcessProbe, charge_bytes, pinned_bytes
from raypipe.memory.records import Ask, node_folder, slot_path
from raypipe.memory.registration import Registration
from raypipe.memory.slot import Slot
from raypipe.store import this_node
from raypipe.units import format_bytes

ASK_AGAIN_S = 0.25
LOOK_EVERY_S = 0.1
# A watch that has not looked at us for so many of our looks hangs.
STALLED_LOOKS = 50
# Longer than one round of a group (`budget.GATHER_S`), which says for itself what it misses.
FIRST_WORD_S, SAY_WAITING_EVERY_S = 20.0, 30.0


class LeaseTimeout(MemoryBudgetExceeded):
    """The lease may come later: others held the memory as long as was waited."""


def to_stderr(text: str) -> None:
    """A worker's own: shown with --verbose only."""
    print(text, file=sys.stderr, flush=True)


def join(
    budget_bytes: int,
    label: str,
    *,
    capacity_bytes: int,
    shared_by: str = "",
    least_bytes: int | None = None,
    beside_bytes: int = 0,
    priority: int = 0,
    verdict_dir: Path | None,
    wait_s: float,
    say: Callable[[str], None] = to_stderr,
) -> RemoteGuard:
    """Wait for this process's lease on its node, and have it watched until the guard is closed.

    capacity_bytes, shared_by, least_bytes, beside_bytes, priority : see ``memory.records.Ask``.
    say : told of waiting and of trouble. Raises LeaseTimeout when the lease did not come in
    ``wait_s``, MemoryBudgetExceeded when it can never be granted or is used up already; ConfigError
    for a budget that is too small, or a second join; WorkerFailed when the node's actor does not
    start.
    """
    held, hard = charge_bytes(), Limits.of(budget_bytes).hard_bytes
    if held >= hard:
        raise MemoryBudgetExceeded(
            f"{label} holds {format_bytes(held)} before it begins, its budget is "
            f"{format_bytes(budget_bytes)}, of which {format_bytes(hard)} can be used; give a larger "
            "--max-memory-per-process"
        )
    node_id = ray.get_runtime_context().get_node_id()
    registration, slot = _introduce(node_id, budget_bytes, label, verdict_dir)
    if least_bytes is not None:  # what it holds has to fit a smaller one too
        least_bytes = min(budget_bytes, max(least_bytes, 2 * held))
    ask = Ask(
        registration=registration,
        capacity_bytes=capacity_bytes,
        shared_by=shared_by,
        least_bytes=least_bytes,
        beside_bytes=beside_bytes,
        priority=priority,
    )
    try:
        answer = _wait_for_lease(node_id, ask, wait_s, say)
    except BaseException:
        _leave(node_id, ask, slot)
        raise
    if answer.budget_bytes < budget_bytes:
        say(
            f"{label} has a budget of {format_bytes(answer.budget_bytes)} instead of "
            f"{format_bytes(budget_bytes)}: others on this machine hold the rest"
        )
    granted = replace(registration, budget_bytes=answer.budget_bytes)
    ask = replace(ask, registration=granted, least_bytes=None, holds=True)
    return RemoteGuard(node_id, ask, answer, slot, say)


class RemoteGuard:
    """The guard of a process that its node's memory actor watches."""

    def __init__(
        self, node_id: str, ask: Ask, answer: Answer, slot: Slot, say: Callable[[str], None]
    ) -> None:
        self._node_id, self._ask, self._slot, self._say = node_id, ask, slot, say
        self.since = answer.since  # when the actor began that first answered
        self._own: InProcessGuard | None = None  # when the actor is lost for good
        self._closing = threading.Event()
        self._tell(answer)
        self._keeper = threading.Thread(
            target=self._keep, args=(answer.pid,), name="raypipe-memory-keeper", daemon=True
        )
        self._keeper.start()

    @property
    def budget_bytes(self) -> int:
        """The lease."""
        return self._ask.registration.budget_bytes

    def pressure(self) -> bool:
        """Whether less has to be taken from here on: a look into shared memory."""
        return self._slot.pressure if self._own is None else self._own.pressure()

    def note(self, *, batch: int | None = None, phase: str | None = None) -> None:
        """Where the verdict can read it."""
        if batch is not None:
            self._slot.batch = batch
        if phase is not None:
            self._slot.phase = phase

    def count_relief(self) -> None:
        """``relieve`` was called."""
        self._slot.reliefs += 1

    def __enter__(self) -> RemoteGuard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lease back."""
        if not self._closing.is_set():
            self._closing.set()
            self._keeper.join(CALL_TIMEOUT_S)
            _leave(self._node_id, self._ask, self._slot)

    # ---- the keeper's side

    def _keep(self, actor_pid: int) -> None:
        """Whatever ends the keeper, the budget is kept: by this process itself then."""
        try:
            self._keep_watched(actor_pid)
        except Exception as error:
            label = self._ask.registration.label
            self._say(f"{label} is watched no more ({error!r}); it keeps its budget by itself now")
            self._own = InProcessGuard(self.budget_bytes, label)

    def _keep_watched(self, actor_pid: int) -> None:
        """Bring the actor back when it has died or hangs, and count what only this process can."""
        watcher, looks, beats, still = _probe(actor_pid), 0, 0, 0
        while not self._closing.wait(LOOK_EVERY_S):
            looks += 1
            if looks % 5 == 0:
                self._slot.pinned_bytes = pinned_bytes()
            still = still + 1 if self._slot.beats == beats else 0
            beats = self._slot.beats
            alive = watcher is not None and _is_alive(watcher)
            if alive and still >= STALLED_LOOKS:
                self._say(f"memory actor {actor_pid} hangs; it is ended and made again")
                os.kill(actor_pid, signal.SIGKILL)
                still = 0
            elif not alive:
                if watcher is not None:
                    watcher.close()
                answer = self._rejoin()
                if answer is None:
                    return
                actor_pid, still = answer.pid, 0
                watcher = _probe(actor_pid)

    def _rejoin(self) -> Answer | None:
        """From a new actor; None when this process leaves, or there will be none."""
        if not ray.is_initialized():
            return None
        try:
            answer: Answer | None = call(
                self._node_id, "admit", self._ask, START_TIMEOUT_S, self._closing
            )
        except WorkerFailed as error:
            self._say(f"{error}; {self._ask.registration.label} keeps its budget by itself now")
            self._own = InProcessGuard(self.budget_bytes, self._ask.registration.label)
            return None
        if answer is not None:
            self._tell(answer)
        return answer

    def _tell(self, answer: Answer) -> None:
        for note in answer.notes:
            self._say(note)


_joined = threading.Lock()  # held from a join to its end: one lease a process


def _introduce(
    node_id: str, budget_bytes: int, label: str, verdict_dir: Path | None
) -> tuple[Registration, Slot]:
    """This process's slot, and what its node is told of it. Raises ConfigError: it has joined."""
    if not _joined.acquire(blocking=False):
        raise ConfigError(
            f"{label}: process {os.getpid()} has joined its node's memory actor already; leave "
            "that block first"
        )
    try:
        with ProcessProbe(os.getpid()) as me:
            start_ticks = me.start_ticks
        path = slot_path(node_folder(node_id), os.getpid(), start_ticks)
        registration = Registration(
            pid=os.getpid(),
            start_ticks=start_ticks,
            budget_bytes=budget_bytes,
            label=label,
            slot_path=path,
            verdict_dir=verdict_dir,
        )
        return registration, Slot.create(path)
    except BaseException:
        _joined.release()
        raise


def _wait_for_lease(node_id: str, ask: Ask, wait_s: float, say: Callable[[str], None]) -> Answer:
    deadline, next_word = time.monotonic() + wait_s, time.monotonic() + FIRST_WORD_S
    label = f"{ask.registration.label} on node {this_node()}"
    while True:
        answer: Answer = call(node_id, "admit", ask, START_TIMEOUT_S)
        if answer.state == "granted":
            return answer
        if answer.state == "refused":
            raise MemoryBudgetExceeded(
                f"{label} cannot start: {answer.text}; give a smaller --max-memory-per-process or "
                "a machine with more memory"
            )
        if time.monotonic() >= deadline:
            raise LeaseTimeout(
                f"{label} did not get its memory in {wait_s:.0f} s: {answer.text}; give fewer "
                "--workers or a smaller --max-memory-per-process, or wait for the others to end"
            )
        if time.monotonic() >= next_word:
            left_s = deadline - time.monotonic()
            say(f"{label} waits for memory: {answer.text}; ends in {left_s:.0f} s")
            next_word = time.monotonic() + SAY_WAITING_EVERY_S
        time.sleep(min(ASK_AGAIN_S, max(0.0, deadline - time.monotonic())))


def _leave(node_id: str, ask: Ask, slot: Slot) -> None:
    """Give back lease and slot. An actor that is gone has nothing to be given back to."""
    slot.path.with_suffix(".json").unlink(missing_ok=True)  # nor has its successor
    try:
        if ray.is_initialized():
            actor = ray.get_actor(actor_name(node_id), namespace=NAMESPACE)
            ray.get(actor.leave.remote(ask.holder), timeout=CALL_TIMEOUT_S)
    except (ValueError, *ACTOR_LOST, GetTimeoutError):
        pass
    finally:
        slot.path.unlink(missing_ok=True)
        _joined.release()


def _probe(pid: int) -> ProcessProbe | None:
    try:
        return ProcessProbe(pid)
    except ProcessLookupError:
        return None


def _is_alive(probe: ProcessProbe) -> bool:
    try:
        probe.read()
    except ProcessLookupError:
        return False
    return True
