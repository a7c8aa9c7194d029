"""The memory actor of each node: how it is made, asked, and made again.

The actor is ``memory.node.NodeMemory``. It belongs to no process (detached, in one namespace for
all runs of a cluster), so that no worker's death takes it along, and ends itself when nobody has
been there for a minute. How a process joins the one of its node is ``remote_guard``.

Ray 2.60's own memory monitor ends workers that can be restarted first, then the newest, then the
next newest, until enough is free (worker_killing_policy_by_time.cc; seen to be so). The actor has
``max_restarts=0``; and ``make_everywhere``, called before any worker starts, makes it the oldest
of its node, so the hog goes first. On a node that comes later the first worker finds no actor and
makes it: it then gives way to a worker that is newer (``RemoteGuard.since``).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raypipe.cluster.lost import ACTOR_LOST
from raypipe.errors import WorkerFailed
from raypipe.memory.node import NodeMemory, Waiting
from raypipe.memory.records import clear_abandoned_folders, node_folder
from raypipe.memory.verdict import Verdict

NAMESPACE = "raypipe"
# An actor's process starts in 1 s; on a node that pulls its packages first, in a minute.
START_TIMEOUT_S = 120.0
CALL_TIMEOUT_S = 10.0
IDLE_S = 60.0


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
        except ACTOR_LOST:  # the node was lost meanwhile
            continue
    return states


def verdict_of(node_id: str, pid: int, timeout_s: float = CALL_TIMEOUT_S) -> Verdict | None:
    """Why a process of that node was ended; works when the process is gone.

    None where the node's actor knows of nothing, or is not alive: then the run's folder tells.
    """
    try:
        actor = ray.get_actor(actor_name(node_id), namespace=NAMESPACE)
        return ray.get(actor.verdict_of.remote(pid), timeout=timeout_s)
    except (ValueError, *ACTOR_LOST, GetTimeoutError):
        return None


def why_waiting(asked: Mapping[str, str], timeout_s: float = CALL_TIMEOUT_S) -> dict[str, Waiting]:
    """What processes wait for and who holds it, by their nodes' ledgers; asked : label -> node id.

    Without those that do not wait, and those of nodes whose actor does not answer in time, or not so:
    it outlives the run that made it, and may be an older raypipe's. No error of Ray's comes out of a
    line for people.
    """
    refs: dict[Any, str] = {}
    for label, node_id in asked.items():
        try:
            actor = ray.get_actor(actor_name(node_id), namespace=NAMESPACE)
            refs[actor.why_waiting.remote(label)] = label
        except (ValueError, AttributeError, RayError):  # none is there, or it has no such method
            continue
    found = {}
    for ref in ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)[0] if refs else ():
        try:
            wait = ray.get(ref)
        except RayError:
            continue
        if isinstance(wait, Waiting):
            found[refs[ref]] = wait
    return found


def call(
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
        except (*ACTOR_LOST, GetTimeoutError) as error:
            # For some 0.1 s after its death Ray still gives out the handle of the dead one.
            if time.monotonic() >= deadline:
                said = " ".join(str(error).split())[:300]
                raise WorkerFailed(
                    f"the memory actor of node {node_id[:8]} did not answer in {timeout_s:.0f} s "
                    f"({said}); see Ray's logs (--verbose)"
                ) from error
        time.sleep(0.05)
    return None


def _spare_from_oom_killer() -> None:
    """Ray offers its workers to the kernel first (1000); ours is as any other process again."""
    adjustment = Path("/proc/self/oom_score_adj")
    if adjustment.exists():
        try:
            adjustment.write_text("0")
        except PermissionError as error:
            print(f"{adjustment}: {error.strerror}", file=sys.stderr, flush=True)
