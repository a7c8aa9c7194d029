"""The memory actor of each node, and how a process joins the one of its own.

The actor is ``memory.node.NodeMemory``. It belongs to no process (detached, in one namespace for
all runs of a cluster), so that no worker's death takes it along, and ends itself when nobody has
been there for a minute. A process joins for the length of a block: it waits for its lease, is
watched, and brings the actor back within two seconds should that ever die.

Ray 2.60's own memory monitor ends workers that can be restarted first, then the newest, then the
next newest, until enough is free (worker_killing_policy_by_time.cc; seen to be so). The actor has
``max_restarts=0``; and ``make_everywhere``, called before any worker starts, makes it the oldest
of its node, so the hog goes first. On a node that comes later the first worker finds no actor and
makes it: it then gives way to a worker that is newer (``RemoteGuard.since``).
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
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raypipe.errors import ConfigError, MemoryBudgetExceeded, WorkerFailed
from raypipe.memory.guard import InProcessGuard
from raypipe.memory.node import Answer, NodeMemory
from raypipe.memory.policy import Limits
from raypipe.memory.probe import ProcessProbe, charge_bytes, pinned_bytes
from raypipe.memory.records import Ask, clear_abandoned_folders, node_folder, slot_path
from raypipe.memory.registration import Registration
from raypipe.memory.slot import Slot
from raypipe.memory.verdict import Verdict
from raypipe.units import format_bytes

NAMESPACE = "raypipe"
# An actor's process starts in 1 s; on a node that pulls its packages first, in a minute.
START_TIMEOUT_S = 120.0
CALL_TIMEOUT_S = 10.0
ASK_AGAIN_S = 0.25
IDLE_S = 60.0
LOOK_EVERY_S = 0.1
# A watch that has not looked at us for so many of our looks hangs.
STALLED_LOOKS = 50
SAY_WAITING_EVERY_S = 30.0


class LeaseTimeout(MemoryBudgetExceeded):
    """The lease may come later: others held the memory as long as was waited."""


class NodeMemoryActor(NodeMemory):
    """What becomes the actor: it stands back from the kernel's OOM killer, and ends when idle."""

    def __init__(self, node_id: str, idle_s: float = IDLE_S) -> None:
        self._ends_after_s = idle_s
        folder = node_folder(node_id)
        clear_abandoned_folders(folder)
        _spare_from_oom_killer()
        super().__init__(folder, on_failure=lambda: os._exit(1))  # dead, it is brought back
        threading.Thread(target=self._retire_when_idle, daemon=True).start()

    def _retire_when_idle(self) -> None:
        """Who comes in this very moment meets a dead actor, and makes another."""
        while self.idle_s() < self._ends_after_s:
            time.sleep(self._ends_after_s / 4)
        self.close()
        # A call of exit_actor to oneself waits for its own answer for ever; an exit of the process
        # is reported to every driver as a crash.
        ray.kill(ray.get_runtime_context().current_actor)


def actor_name(node_id: str) -> str:
    """The name of a node's memory actor in ``NAMESPACE``."""
    return f"raypipe-memory-{node_id}"


def node_actor(node_id: str) -> Any:
    """The handle of a node's memory actor; it is made there if it is not alive."""
    return (
        ray.remote(NodeMemoryActor)
        .options(
            name=actor_name(node_id),
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=8,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote(node_id)
    )


def make_everywhere(timeout_s: float = START_TIMEOUT_S) -> dict[str, dict[str, Any]]:
    """Make the actor of every node that is alive; returns node id -> its state.

    For drivers, before their first worker. A node whose actor does not come in time is left out:
    its first worker tries again.
    """
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    asked = {node_actor(node_id).state.remote(): node_id for node_id in nodes}
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    states = {}
    for ref in ready:
        try:
            states[asked[ref]] = ray.get(ref)
        except RayActorError:  # the node was lost meanwhile
            continue
    return states


def verdict_of(node_id: str, pid: int, timeout_s: float = CALL_TIMEOUT_S) -> Verdict | None:
    """Why a process of that node was ended; works when the process is gone.

    None where the node's actor knows of nothing, or is not alive: then the run's folder tells.
    """
    try:
        actor = ray.get_actor(actor_name(node_id), namespace=NAMESPACE)
        return ray.get(actor.verdict_of.remote(pid), timeout=timeout_s)
    except (ValueError, RayActorError, GetTimeoutError):
        return None


def join(
    budget_bytes: int,
    label: str,
    *,
    capacity_bytes: int,
    shared_by: str = "",
    least_bytes: int | None = None,
    verdict_dir: Path | None,
    wait_s: float,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> RemoteGuard:
    """Wait for this process's lease on its node, and have it watched until the guard is closed.

    capacity_bytes, shared_by, least_bytes : see ``memory.records.Ask``. say : told of waiting and
    of trouble. Raises LeaseTimeout when the lease did not come in ``wait_s``, MemoryBudgetExceeded
    when it can never be granted or is used up already; ConfigError for a budget that is too small,
    or a second join; WorkerFailed when the node's actor does not start.
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
            answer: Answer | None = _call(
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
    deadline, next_word = time.monotonic() + wait_s, time.monotonic() + SAY_WAITING_EVERY_S
    label = ask.registration.label
    while True:
        answer: Answer = _call(node_id, "admit", ask, START_TIMEOUT_S)
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
            say(f"{label} waits for memory: {answer.text}")
            next_word = time.monotonic() + SAY_WAITING_EVERY_S
        time.sleep(min(ASK_AGAIN_S, max(0.0, deadline - time.monotonic())))


def _call(
    node_id: str, method: str, told: Any, timeout_s: float, ended: threading.Event | None = None
) -> Any:
    """The answer of the node's actor, which is made again as often as it dies in ``timeout_s``.

    None when ``ended`` is set meanwhile. Raises WorkerFailed.
    """
    deadline = time.monotonic() + timeout_s
    while ended is None or not ended.is_set():
        try:
            left = max(1.0, deadline - time.monotonic())
            call = getattr(node_actor(node_id), method).remote(told)
            return ray.get(call, timeout=left)
        except (RayActorError, GetTimeoutError) as error:
            # For some 0.1 s after its death Ray still gives out the handle of the dead one.
            if time.monotonic() >= deadline:
                said = " ".join(str(error).split())[:300]
                raise WorkerFailed(
                    f"the memory actor of node {node_id[:8]} did not answer in {timeout_s:.0f} s "
                    f"({said}); see Ray's logs (--verbose)"
                ) from error
        time.sleep(0.05)
    return None


def _leave(node_id: str, ask: Ask, slot: Slot) -> None:
    """Give back lease and slot. An actor that is gone has nothing to be given back to."""
    slot.path.with_suffix(".json").unlink(missing_ok=True)  # nor has its successor
    try:
        if ray.is_initialized():
            actor = ray.get_actor(actor_name(node_id), namespace=NAMESPACE)
            ray.get(actor.leave.remote(ask.holder), timeout=CALL_TIMEOUT_S)
    except (ValueError, RayActorError, GetTimeoutError):
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


def _spare_from_oom_killer() -> None:
    """Ray offers its workers to the kernel first (1000); ours is as any other process again."""
    adjustment = Path("/proc/self/oom_score_adj")
    if adjustment.exists():
        try:
            adjustment.write_text("0")
        except PermissionError as error:
            print(f"{adjustment}: {error.strerror}", file=sys.stderr, flush=True)
