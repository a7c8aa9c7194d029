"""Run by test_remote_rows: three nodes, each with one source on its own disk, and none of the driver's.

First one worker, which has one source on its node and two from the others: its losses are those of
a run without Ray, bit for bit. Then a worker a node, against the same with every file at hand.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

import ray
import train_helpers
from ray.cluster_utils import Cluster
from train_helpers import ToyTask, config, losses, write_toy

from raypipe.cluster.runner import RayRunner
from raypipe.runner import LocalRunner
from raypipe.store import FeatureStore, declare, stand_in
from raypipe.store.adoption import adopt, plan_adoption
from raypipe.stream import ArraySource

for module in (sys.modules[__name__], train_helpers):
    ray.cloudpickle.register_pickle_by_value(module)  # workers cannot import tests

NODE = {"num_cpus": 1, "object_store_memory": 80 * 1024**2, "include_dashboard": False}
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
    task, cfg = placed(folder), config(epochs=2, batch_size=8)
    whole = ToyTask(task.data)
    os.environ["RAYPIPE_NODE"] = "A"
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    for node in "BC":
        cluster.add_node(**NODE, env_vars={"RAYPIPE_NODE": node})
    os.environ["RAYPIPE_NODE"] = "the driver's"
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    cluster.wait_for_nodes()
    runner = RayRunner(joined=True, on_event=print)

    runner.fit(task, cfg, folder / "one", device="cpu")
    LocalRunner().fit(whole, cfg, folder / "no-ray", device="cpu")
    assert losses(folder / "one") == losses(folder / "no-ray")
    assert losses(folder / "one", "epoch") == losses(folder / "no-ray", "epoch")
    log = (folder / "one" / "train.log").read_text()
    assert log.count("local copy") == 1 and log.count("from node") == 2, log

    three = replace(cfg, batch_size=3)
    runner.fit(task, three, folder / "three", workers=3, device="cpu")
    runner.fit(whole, three, folder / "three-at-hand", workers=3, device="cpu")
    assert losses(folder / "three") == losses(folder / "three-at-hand")
    log = (folder / "three" / "train.log").read_text()
    assert log.count("local copy") == 3 and log.count("from node") == 6, log
    print("all good", flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
