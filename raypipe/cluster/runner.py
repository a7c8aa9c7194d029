"""The runner that works on Ray: ``runner.Runner`` by actor pools and Ray Train."""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray.autoscaler.sdk import request_resources

from raypipe.cluster.budget import WorkerMemory, worker_share
from raypipe.cluster.node_memory import make_everywhere
from raypipe.cluster.pool import SAY_WAITING_EVERY_S, START_TIMEOUT_S, RayPool
from raypipe.cluster.shards import open_shards
from raypipe.cluster.stalls import Stalls
from raypipe.errors import ConfigError, DeviceUnavailable, WorkerFailed
from raypipe.memory.attend import attend
from raypipe.memory.config import ResolvedMemory, resolve
from raypipe.memory.limits import node_limits
from raypipe.runner import Machines, Needs, StepWorker
from raypipe.stream.at_hand import far_sources, open_at_hand
from raypipe.stream.reading import OpenRows, Source
from raypipe.units import format_bytes

if TYPE_CHECKING:
    from raypipe.train import FitResult, Task, TrainConfig

# Ray Data's read tasks need a share of a core: two Train workers that took both cores of a
# two-core machine would wait for them for ever.
TRAIN_SHARE = 0.75


class RayRunner:
    """Runs on the open Ray session; see ``cluster.session``.

    joined : the session is somebody's cluster, which may grow, rather than this machine's own.
    """

    name = "ray"

    def __init__(
        self,
        *,
        joined: bool,
        on_event: Callable[[str], None],
        memory: ResolvedMemory | None = None,
    ) -> None:
        self._joined, self._say = joined, on_event
        self.memory = memory or resolve()

    def pool(self, worker: Callable[[], StepWorker], needs: Needs) -> RayPool:
        """Actors that load ``worker``, one a GPU on CUDA, each under its node's memory actor.

        Raises MemoryBudgetExceeded when their stated budgets do not fit this machine.
        """
        bundle = {"CPU": needs.cpus, "GPU": 1.0 * needs.device.startswith("cuda")}
        workers = needs.stands_for or needs.workers
        memory = self._worker_memory(workers, needs.run_dir, bundle)
        return RayPool(worker, needs, memory=memory, on_event=self._say)

    def _worker_memory(
        self, workers: int, run_dir: Path | None, bundle: dict[str, float]
    ) -> WorkerMemory:
        # Several nodes of Ray may be one machine, which has its memory once.
        places: Counter[str] = Counter()
        for node in ray.nodes():
            if node["Alive"]:
                places[node["NodeManagerAddress"]] += _places(node["Resources"], bundle)
        per_node = min(workers, max(places.values(), default=0) or workers)
        if not self._joined:  # known here and now; a cluster's nodes say so themselves
            worker_share(self.memory, per_node, node_limits())
        # Before the first worker: Ray's own monitor ends the newest of a node first.
        make_everywhere()
        return WorkerMemory(memory=self.memory, per_node=per_node, run_dir=run_dir)

    def fit(
        self,
        task: Task,
        cfg: TrainConfig,
        run_dir: Path,
        *,
        workers: int = 1,
        device: str = "auto",
        resume: bool = True,
    ) -> FitResult:
        """Train with ``workers`` processes (DDP above one), which all see ``run_dir``."""
        # Torch, Ray Data and Ray Train: seconds that no command waits for which trains nothing.
        from raypipe.cluster.trainer import TrainSetup, train_on_ray
        from raypipe.train import checkpoint, training_plan
        from raypipe.train.follow import TrainProgress
        from raypipe.train.stop import stop_on_interrupt, unless_stopped

        run_dir = run_dir.resolve()  # Train workers have a working directory of their own
        if not resume:
            checkpoint.discard(run_dir)
        needs = self.needs(workers, self.resolve_device(device))
        on_cuda = needs.device == "cuda"
        cpus = min(1.0, TRAIN_SHARE * (_cpus() or 1.0) / workers)
        bundle = {"CPU": cpus, **({"GPU": 1.0} if on_cuda else {})}
        # First of all: memory actors come to the nodes that are there, and before any worker.
        wait_for_room(bundle, workers, self._say)
        setup = TrainSetup(
            task=task,
            cfg=cfg,
            run_dir=run_dir,
            torch_threads=None if on_cuda else max(1, int(_node_cpus() // workers)),
            memory=self._worker_memory(workers, run_dir, bundle),
            name=f"train-worker-{secrets.token_hex(3)}",
            grows=self._joined,
        )
        plan = training_plan(task.train_rows, cfg, workers, run_dir)
        steps = plan.steps_per_epoch * plan.epochs
        with (
            attend(self.memory, run_dir, "driver"),
            TrainProgress(steps, run_dir) as progress,
            stop_on_interrupt(run_dir, workers_wait=True),
        ):
            result = train_on_ray(
                setup, plan, workers=workers, use_gpu=on_cuda, cpus=cpus, tick=progress.tick
            )
        return unless_stopped(result)

    @contextmanager
    def reading(self, sources: Mapping[str, Source], batch_rows: int) -> Iterator[OpenRows]:
        """Rows of other nodes' disks are brought for as long as the block lasts. Raises as
        `open_shards`.
        """
        far = {name: sources[name] for name in far_sources(sources)}
        if not far:
            yield open_at_hand
            return
        with open_shards(
            far,
            batch_rows=batch_rows,
            workers=1,
            memory=self._worker_memory(1, None, {"CPU": 1.0}),
            say=self._say,
        ) as shards:
            yield partial(shards.open_rows, turn=0, say=self._say, stalls=Stalls())

    def resolve_device(self, device: str) -> str:
        """``auto`` -> cuda where the cluster has a GPU now; a joined cluster may still add some.

        Raises DeviceUnavailable.
        """
        gpus = ray.cluster_resources().get("GPU", 0)
        if device == "auto":
            if self._joined and not gpus:
                self._say(
                    "--device auto: the cluster shows no GPU now, so this runs on CPUs; "
                    "--device cuda waits for GPU nodes to come up"
                )
            return "cuda" if gpus else "cpu"
        if device == "cuda" and not gpus and not self._joined:
            raise DeviceUnavailable(
                "--device cuda: this machine shows Ray no GPU; give --device cpu (or auto), or check "
                "nvidia-smi and CUDA_VISIBLE_DEVICES"
            )
        return device

    def needs(self, workers: int | None, device: str) -> Needs:
        """By default a worker a GPU, or one worker with all cores of a node.

        Raises ConfigError for more workers than GPUs on this machine.
        """
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if device == "cuda":
            count = workers or max(gpus, 1)
            if count > gpus and not self._joined:
                raise ConfigError(
                    f"--workers {count}: this machine has {gpus} GPU(s), one a worker"
                )
            return Needs(workers=count, device=device, cpus=1.0)
        count = workers or 1
        cpus = _node_cpus() / count if count == 1 or not self._joined else 1.0
        return Needs(workers=count, device=device, cpus=cpus if cpus < 1 else float(int(cpus)))

    @property
    def machines(self) -> Machines:
        """The nodes that are alive now; a joined cluster may grow."""
        nodes = [
            (node["NodeManagerAddress"], int(node["Resources"].get("CPU", 0.0)))
            for node in ray.nodes()
            if node["Alive"]
        ]
        return Machines(nodes=tuple(nodes), grows=self._joined)

    def facts(self) -> list[tuple[str, str]]:
        """Every node as Ray sees it, and when Ray's own memory monitor steps in."""
        found = [("cluster", "joined" if self._joined else "started on this machine")]
        for node in ray.nodes():
            has = node["Resources"]
            state = "" if node["Alive"] else ", dead"
            found.append(
                (
                    f"node {node['NodeManagerHostname']}{state}",
                    f"{has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs, "
                    f"{format_bytes(has.get('memory', 0))} for workers, "
                    f"{format_bytes(has.get('object_store_memory', 0))} object store",
                )
            )
        threshold = os.environ.get("RAY_memory_usage_threshold", "0.95")  # noqa: SIM112
        every_ms = os.environ.get("RAY_memory_monitor_refresh_ms", "250")  # noqa: SIM112
        watch = f"ends workers above {float(threshold):.0%} of the node, looks every {every_ms} ms"
        found.append(("Ray's memory monitor", "off" if every_ms == "0" else watch))
        return found


def wait_for_room(
    bundle: dict[str, float],
    workers: int,
    say: Callable[[str], None],
    *,
    timeout_s: float = START_TIMEOUT_S,
    look_every_s: float = 2.0,
) -> None:
    """Wait until the cluster could hold ``workers`` times ``bundle``, asking an autoscaler for it.

    Ray Train itself waits for ever, in silence. Raises DeviceUnavailable or WorkerFailed when the
    room does not come.
    """
    deadline, next_word = time.monotonic() + timeout_s, time.monotonic()
    asked = False
    while True:
        has = ray.cluster_resources()
        short = {k: v * workers for k, v in bundle.items() if has.get(k, 0.0) < v * workers - 1e-6}
        if not short:
            break
        text = ", ".join(f"{v:g} {k}, it has {has.get(k, 0.0):g}" for k, v in short.items())
        if time.monotonic() > deadline:
            kind = DeviceUnavailable if "GPU" in short else WorkerFailed
            raise kind(
                f"{workers} training worker(s) need {text}; none came in {timeout_s:.0f} s: give "
                "fewer --workers, --device cpu, or let the cluster grow"
            )
        if not asked:
            request_resources(bundles=[bundle] * workers)
            asked = True
        if time.monotonic() >= next_word:
            say(f"waiting for the cluster to grow: {workers} training worker(s) need {text}")
            next_word = time.monotonic() + SAY_WAITING_EVERY_S
        time.sleep(look_every_s)
    if asked:
        request_resources(bundles=[])  # the training run itself asks from here on


def _places(node: dict[str, float], bundle: dict[str, float]) -> int:
    """How many of ``bundle`` fit a node: Ray packs them, and none may find its memory taken."""
    wanted = {name: amount for name, amount in bundle.items() if amount > 0}
    return min(
        (int(node.get(name, 0.0) / amount + 1e-6) for name, amount in wanted.items()), default=0
    )


def _cpus() -> float:
    return float(ray.cluster_resources().get("CPU", os.cpu_count() or 1))


def _node_cpus() -> float:
    """CPUs of the largest node that is alive: a worker cannot span two."""
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    return float(max(nodes, default=1.0) or 1.0)
