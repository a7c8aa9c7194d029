"""Run by test_node_memory: Ray's own monitor, with a threshold that a hog soon passes."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil

GIB = 1024**3
memory = psutil.virtual_memory()
threshold = (memory.total - memory.available + 2.5 * GIB) / memory.total
os.environ["RAY_memory_usage_threshold"] = f"{threshold:.4f}"  # noqa: SIM112
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray  # noqa: E402

from raypipe.cluster.node_memory import make_everywhere  # noqa: E402
from raypipe.cluster.remote_guard import join  # noqa: E402


class Hog:
    """Within its budget, on a node whose memory somebody else has used up."""

    def begin(self, folder: Path) -> int:
        self.guard = join(8 * GIB, "hog", capacity_bytes=8 * GIB, verdict_dir=folder, wait_s=60)
        return os.getpid()

    def eat(self) -> None:
        self.held = [bytearray(GIB // 4) for _ in range(14)]
        time.sleep(30)


def main(folder: Path) -> None:
    ray.init(
        address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        object_store_memory=100 * 1024**2,
    )  # fmt: skip
    (state,) = make_everywhere().values()
    hog = ray.remote(Hog).options(num_cpus=0, max_restarts=0).remote()
    pid = ray.get(hog.begin.remote(folder), timeout=60)
    try:
        ray.get(hog.eat.remote(), timeout=60)
        raise SystemExit("Ray's monitor did nothing")
    except ray.exceptions.OutOfMemoryError:
        pass
    time.sleep(1)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == "zombie"
    assert psutil.pid_exists(state["pid"]), "the memory actor went too"
    (after,) = make_everywhere().values()
    assert after["pid"] == state["pid"]
    assert after["leases"] == {}
    print("all good", flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
