"""Run by test_remote_rows: three nodes, each with one source on its own disk, and none of the driver's.

A worker a node: each has one source on its disk, and the rows of the other two brought to it. The
losses are, bit for bit, those of three processes without Ray that have every file at hand.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

import ray
import train_helpers
from ray.cluster_utils import Cluster
from train_helpers import ToyTask, begin, config, losses, run, write_toy

from raypipe.cluster.runner import RayRunner
from raypipe.cluster.session import open_session
from raypipe.store import FeatureStore, declare, stand_in
from raypipe.store.adoption import adopt, plan_adoption
from raypipe.stream import ArraySource
from raypipe.train import TrainConfig

for module in (sys.modules[__name__], train_helpers):
    ray.cloudpickle.register_pickle_by_value(module)  # workers cannot import tests

NODE = {
    "num_cpus": 1,
    "object_store_memory": 80 * 1024**2,
    "include_dashboard": False,
    "include_log_monitor": False,  # whose lines nobody reads
}
HEAD = NODE | {"no_monitor": True}  # nobody scales this cluster
PLACES = {"x": "A", "y": "B", "row": "C"}  # which node has which source


@dataclass(frozen=True)
class PlacedTask(ToyTask):
    """Its sources by the catalogs of a folder that holds nothing else."""

    catalogs: Path = Path()

    def sources(self) -> Mapping[str, ArraySource]:
        return {
            name: ArraySource.of_locator(stand_in(self.catalogs / f"{name}.npy")) for name in PLACES
        }


def placed(folder: Path) -> PlacedTask:
    """The toy's arrays as stores, one a node; ``data`` is the folder of all of them, at hand."""
    toy = write_toy(folder / "whole")
    for name, node in PLACES.items():
        there = folder / f"disk-of-{node}" / f"{name}.npy"
        there.parent.mkdir()
        there.write_bytes((toy.data / f"{name}.npy").read_bytes())
        adopt(plan_adoption(there))
        declare(FeatureStore.open(there), node, at=folder / "catalogs" / f"{name}.npy")
    return PlacedTask(data=toy.data, catalogs=folder / "catalogs")


def main(folder: Path) -> None:
    task, cfg = placed(folder), config(epochs=2, batch_size=3)
    plain = partial(at_hand, cfg, ToyTask(task.data), folder / "at-hand")
    # Beside the nodes, which take long to start; before this process has Ray's threads.
    wait_for_reference = begin(plain, folder, 3, "fork")
    on_three_nodes(task, cfg, folder)
    wait_for_reference()
    for kind in ("step", "epoch"):
        assert losses(folder / "three", kind) == losses(folder / "at-hand", kind), kind
    print("all good", flush=True)


def on_three_nodes(task: PlacedTask, cfg: TrainConfig, folder: Path) -> None:
    os.environ["RAYPIPE_NODE"] = "A"
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    for node in "BC":
        cluster.add_node(**NODE, env_vars={"RAYPIPE_NODE": node})
    os.environ["RAYPIPE_NODE"] = "the driver's"
    run_dir = folder / "three"
    measured = replace(cfg, predict_memory=True)  # which reads rows too
    with open_session(cluster.address):
        cluster.wait_for_nodes()
        RayRunner(joined=True, on_event=print).fit(task, measured, run_dir, workers=3, device="cpu")
    log = (run_dir / "train.log").read_text()
    assert log.startswith("row servers start on node A for x; node B for y; node C for row\n"), log
    assert log.count("local copy") == 3 and log.count("from node") == 6, log
    for node in reversed(cluster.list_all_nodes()):  # nothing is left to be done gracefully
        cluster.remove_node(node, allow_graceful=False)


def at_hand(cfg: TrainConfig, task: ToyTask, run_dir: Path, rank: int, world: int) -> None:
    run(task, cfg, run_dir, rank=rank, world=world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
