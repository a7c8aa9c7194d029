"""Extraction and training on 1 to 4 simulated nodes, whose workers sleep instead of computing.

    python benchmarks/scale.py [--step-ms 300] [--batches 90] [--steps 30] [--epochs 3]

The nodes are Ray's `cluster_utils.Cluster` on this one machine, each with a CPU (one worker), an
object store and raypipe's memory actor; batches are of 16 rows and take --step-ms, as on a GPU, so
what is lost is raypipe's and Ray's doing, and that four nodes share the cores of one machine: some 15 ms
a step on two cores, whatever --step-ms. See scale_extract and scale_train for what is real.

efficiency_K          : the lower of the next two
extract_efficiency_K, train_efficiency_K : rows/s on K nodes over K times those on one
extract_rows_per_s_K, train_rows_per_s_K : steady state; training's with validation, checkpoint and
                        report of each epoch (of --steps steps); train_in_epoch_rows_per_s_K without
extract_of_sleep_K, train_of_sleep_K     : over what K workers would do that only slept
extract_start_s_K, train_start_s_K       : until the last worker had its first batch; not in the rates
cluster_start_s       : Ray with its first node
driver_cpu_ms_an_item_K : CPU time of the driver for a work item, all its threads
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Read when Ray's nodes start; see raypipe.cluster.session for the reasons.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
# Four nodes that start on two cores: Ray gives each of them 30 s.
os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")

import common
import ray
import scale_extract
import scale_train
from ray.cluster_utils import Cluster

from raypipe.cluster.runner import RayRunner
from raypipe.memory.config import MemoryFlags, resolve

NODE = {"num_cpus": 1, "object_store_memory": 80 * 1024**2}
# All nodes share this machine's ledger: four of these have to fit it.
BUDGET = "1536MiB"


@contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster of one node, joined; ended with the block."""
    made = Cluster(initialize_head=True, head_node_args=NODE)
    try:
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--step-ms", type=float, default=300.0, help="that a batch takes")
    parser.add_argument("--batches", type=int, default=90, help="to extract, a node")
    parser.add_argument("--steps", type=int, default=30, help="of training, an epoch")
    parser.add_argument("--epochs", type=int, default=3, help="of training, after the first")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 3, 4], help="1 first")
    options = parser.parse_args()
    step_s = options.step_ms / 1e3
    metrics: dict[str, object] = {
        "step_ms": options.step_ms,
        "batch": scale_extract.BATCH,
        "steps": options.steps,
    }
    memory = resolve(MemoryFlags(max_memory_per_process=BUDGET))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as tmp, cluster() as nodes:
        metrics["cluster_start_s"] = time.monotonic() - began
        runner = RayRunner(joined=True, on_event=common.say, memory=memory)
        root = Path(tmp)
        for k in options.nodes:
            while len(nodes.list_all_nodes()) < k:
                nodes.add_node(**NODE)
            nodes.wait_for_nodes()
            images = scale_extract.make_images(
                root / f"images-{k}", k * options.batches * scale_extract.BATCH
            )
            extracted, store = scale_extract.run(
                runner, images, root / f"extract-{k}", nodes=k, step_s=step_s
            )
            trained = scale_train.run(
                runner, store, root / f"train-{k}", nodes=k, step_s=step_s,
                steps=options.steps, epochs=options.epochs,
            )  # fmt: skip
            metrics |= {
                f"extract_rows_per_s_{k}": extracted.rows_per_s,
                f"train_rows_per_s_{k}": trained.rows_per_s,
                f"train_in_epoch_rows_per_s_{k}": trained.in_epoch_rows_per_s,
                f"extract_start_s_{k}": extracted.start_s,
                f"train_start_s_{k}": trained.start_s,
                f"driver_cpu_ms_an_item_{k}": extracted.driver_cpu_s / extracted.items * 1e3,
            } | efficiencies(metrics, k, extracted.rows_per_s, trained.rows_per_s)
            common.say(f"{k} node(s): {extracted}\n  {trained}")
    common.emit("scale", metrics, options.json)


def efficiencies(
    so_far: dict[str, object], k: int, extract_rows_per_s: float, train_rows_per_s: float
) -> dict[str, float]:
    """Against one node, and against workers that only sleep."""
    batch, step_ms = float(so_far["batch"]), float(so_far["step_ms"])
    most = k * batch / (step_ms / 1e3)
    found = {
        f"extract_of_sleep_{k}": extract_rows_per_s / most,
        # A batch to validate follows each epoch's steps.
        f"train_of_sleep_{k}": train_rows_per_s / most * (1 + 1 / float(so_far["steps"])),
    }
    if k > 1:
        extract = extract_rows_per_s / (k * so_far["extract_rows_per_s_1"])
        train = train_rows_per_s / (k * so_far["train_rows_per_s_1"])
        found |= {
            f"efficiency_{k}": min(extract, train),
            f"extract_efficiency_{k}": extract,
            f"train_efficiency_{k}": train,
        }
    return found


if __name__ == "__main__":
    main()
