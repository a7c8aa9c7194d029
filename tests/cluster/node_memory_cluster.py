"""Run by test_node_memory: three nodes, the third one late, then one is lost."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray looks five times, 3 s apart, before it takes a node for lost; how long it takes is not ours.
os.environ["RAY_health_check_period_ms"] = "500"  # noqa: SIM112

import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raypipe.cluster.node_memory import actor_name, make_everywhere, verdict_of
from raypipe.cluster.remote_guard import join
from raypipe.errors import MemoryBudgetExceeded

GIB = 1024**3
CAPACITY = 6 * GIB  # the nodes are of one machine, and each of them knows that
NODE = {
    "num_cpus": 1,
    "object_store_memory": 80 * 1024**2,
    "include_dashboard": False,
    "include_log_monitor": False,  # whose lines nobody reads
}
HEAD = NODE | {"no_monitor": True}  # nobody scales this cluster


class Worker:
    def begin(self, folder: Path, label: str, wait_s: float = 60) -> tuple[str, int]:
        self.guard = join(GIB, label, capacity_bytes=CAPACITY, verdict_dir=folder, wait_s=wait_s)
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def eat(self) -> None:
        self.held = bytearray(3 * GIB)


def worker_on(node_id: str) -> Any:
    pinned = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(Worker).options(num_cpus=0, scheduling_strategy=pinned).remote()


def state_of(node_id: str) -> dict[str, Any]:
    actor = ray.get_actor(actor_name(node_id), namespace="raypipe")
    return dict(ray.get(actor.state.remote(), timeout=30))


def until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 40
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def main(folder: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    second = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    assert len(make_everywhere()) == 2
    late = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    assert len(nodes) == 3
    # Two workers a node, at once: still one actor each, of its own node.
    workers = {node_id: [worker_on(node_id), worker_on(node_id)] for node_id in nodes}
    begun = {
        node_id: ray.get([w.begin.remote(folder, "w") for w in pair], timeout=120)
        for node_id, pair in workers.items()
    }
    actors = set()
    for node_id, pair in begun.items():
        assert {where for where, _ in pair} == {node_id}
        state = state_of(node_id)
        assert sorted(state["leases"]) == sorted(str(pid) for _, pid in pair), state
        actors.add(state["pid"])
    assert len(actors) == 3
    try:
        ray.get(worker_on(nodes[0]).begin.remote(folder, "one too many", 1), timeout=60)
        raise SystemExit("the machine gave out more than it has")
    except MemoryBudgetExceeded as error:
        assert "4.00 GiB by other nodes or clusters on this machine" in str(error), error

    cluster.remove_node(second, allow_graceful=False)
    lost = second.node_id
    until(lambda: sum(node["Alive"] for node in ray.nodes()) == 2, "the node is not seen as lost")
    assert verdict_of(lost, begun[lost][0][1], timeout_s=5) is None
    for node_id in (node_id for node_id in nodes if node_id != lost):
        eater, pid = workers[node_id][0], begun[node_id][0][1]
        try:
            ray.get(eater.eat.remote(), timeout=60)
            raise SystemExit("it was not ended")
        except ray.exceptions.RayActorError:
            pass
        until(lambda n=node_id: len(state_of(n)["leases"]) == 1, "its lease is not free")
        verdict = verdict_of(node_id, pid)
        assert verdict is not None and verdict.budget_bytes == GIB
    assert late.node_id in nodes
    print("all good", flush=True)
    ray.shutdown()
    for node in reversed(cluster.list_all_nodes()):  # nothing is left to be done gracefully
        cluster.remove_node(node, allow_graceful=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
