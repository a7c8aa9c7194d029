"""Ray Train around ``train.loop``: worker processes, process group, restarts, the data split.

The loop is the same that runs without Ray; here it gets its rank, its device and its slices.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import train as ray_train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from raypipe.cluster.budget import (
    WorkerMemory,
    budgeted,
    budgeted_together,
    is_younger,
    verdicts,
)
from raypipe.cluster.datasets import PlanDataConfig, plan_dataset, read_slices
from raypipe.cluster.decode_plan import Crew, bytes_on_a_machine, plan_decoders
from raypipe.cluster.decoders import RowOpener
from raypipe.cluster.failures import NoSecondTry, batch_limit, our_error
from raypipe.cluster.leaving import LeavesWithDriver, ask_for_no_nodes, has_left, leave
from raypipe.cluster.session import has_dashboard
from raypipe.cluster.shards import Shards, open_shards
from raypipe.cluster.stalls import Stalls
from raypipe.memory.attend import FOLDER
from raypipe.memory.guard import Guard
from raypipe.memory.limits import node_limits
from raypipe.stream import Cursor, StepSlice, StreamPlan
from raypipe.train import FitResult, Task, TrainConfig, WorkerContext, checkpoint, fit
from raypipe.train.follow import log_aloud, log_to
from raypipe.train.footprint import SIZES
from raypipe.train.stop import note_training, stop_wished

# A worker that dies is restarted from the last whole checkpoint this often.
MAX_FAILURES = 3
# Ray Train gives a worker group a minute to start, and by default as many minutes as it takes.
MAX_START_TIMEOUTS = 20
POLL_S = 0.5
# Ray Train has ended, with all workers, 1 s after it was asked to.
LEAVE_S = 10.0
# A report waits until the controller looks: every 2 s by default, which here was most of an epoch
# (20 epochs of 14 small steps: 7 steps/s against 56 without Ray). It looks at each worker, one call
# a look: more than a few hundred calls a second would be most of what one process can do.
LOOK_S, LOOKS_PER_S, RAY_LOOK_S = 0.1, 500, 2.0


@dataclass(frozen=True, kw_only=True)
class TrainSetup:
    """What travels to every Train worker. Locators and configuration only, never rows.

    name : of this call's workers, unlike any other call's, for verdicts. grows : nodes may still come.
    shards : where the rows
    lie, decoders : who decodes images for a worker, by source; `train_on_ray` finds both out.
    """

    task: Task
    cfg: TrainConfig
    run_dir: Path
    torch_threads: int | None
    memory: WorkerMemory
    name: str
    grows: bool = True
    shards: Shards | None = None
    decoders: Mapping[str, Crew] = field(default_factory=dict)


def train_on_ray(
    setup: TrainSetup,
    plan: StreamPlan,
    *,
    workers: int,
    use_gpu: bool,
    cpus: float,
    tick: Callable[[], None],
) -> FitResult:
    """Run ``setup`` on ``workers`` Train workers; ``tick`` is called about twice a second.
    The plan's descriptors start at the newest whole checkpoint in the run folder, if there is one.

    Raises the worker's own RaypipeError, or WorkerFailed when restarts did not help; and as
    `open_shards`.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", f"{look_s(workers):g}")
    # Relative paths mean the same in a worker as in the driver.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    sources, batch_rows = setup.task.sources(), max(setup.cfg.batch_size, *SIZES)
    decoders = plan_decoders(
        sources.values(),
        world=workers,
        cpus=cpus,
        batch_rows=batch_rows,
        config=setup.memory.memory.config,
        limits=node_limits(),
    )
    with open_shards(
        sources,
        batch_rows=batch_rows,
        workers=workers,
        memory=setup.memory,
        say=log_aloud(setup.run_dir, tick),
        grows=setup.grows,
    ) as shards:
        beside = shards.server_bytes + bytes_on_a_machine(decoders, workers)
        memory = replace(setup.memory, beside_bytes=beside)
        setup = replace(setup, shards=shards, decoders=decoders, memory=memory)
        trainer = _trainer(setup, plan, workers, use_gpu, cpus)
        return _fit_in_thread(trainer, setup, tick)


def look_s(workers: int) -> float:
    """Seconds between two looks of the controller at each of ``workers``."""
    return min(RAY_LOOK_S, max(LOOK_S, workers / LOOKS_PER_S))


def _trainer(
    setup: TrainSetup, plan: StreamPlan, workers: int, use_gpu: bool, cpus: float
) -> TorchTrainer:
    run_dir = setup.run_dir

    def start() -> Cursor:
        found = checkpoint.newest(run_dir)
        if found is None:
            return Cursor()
        return Cursor(found.meta["progress"]["epoch"], found.meta["progress"]["step"])

    return (TorchTrainer if has_dashboard() else WithoutDashboard)(
        _train_worker,
        train_loop_config={"setup": ray.put(setup)},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if use_gpu else {})},
        ),
        datasets={"train": plan_dataset(plan, 0, 1, Cursor())},  # PlanDataConfig cuts it by rank
        dataset_config=PlanDataConfig(plan, start),
        run_config=RunConfig(
            name="ray-train",
            storage_path=str(run_dir),
            failure_config=FailureConfig(
                # A worker that outgrows its budget comes back with half the batch, down to one row.
                max_failures=MAX_FAILURES + setup.cfg.batch_size.bit_length(),
                controller_failure_limit=MAX_START_TIMEOUTS,
            ),
            callbacks=[
                NoSecondTry(setup.memory, setup.name),
                LeavesWithDriver(run_dir, setup.name),
            ],
        ),
    )


class WithoutDashboard(TorchTrainer):
    """Starts no actor that frees the workers' places should the controller die before its driver.

    That one asks the dashboard of the machine's last Ray (/tmp/ray/ray_current_cluster) whether the
    controller lives. Ours has none; and where that Ray is another or gone, the end of a training waited
    12 s for the answer (nearly every one of the suite's did). The places are free when the driver ends.
    """

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()
        return [one for one in made if not isinstance(one, PlacementGroupCleanerCallback)]


def _fit_in_thread(trainer: TorchTrainer, setup: TrainSetup, tick: Callable[[], None]) -> FitResult:
    """Off the main thread Ray Train leaves SIGINT alone; its own handler would exit with 0."""
    box: dict[str, Any] = {}
    over = threading.Event()  # an interrupted Thread.join takes its thread for ended

    def run() -> None:
        try:
            box["result"] = trainer.fit()
        except BaseException as error:
            box["error"] = error
        over.set()
        has_left(setup.run_dir, setup.name)  # where its driver waits for that no more

    threading.Thread(target=run, name="ray-train", daemon=True).start()
    try:
        while not over.wait(POLL_S):
            tick()
    except BaseException as error:  # an interrupt, or of ``tick``: nobody waits for the result now
        try:
            _take_along(trainer, setup, over)
        except OSError as cannot:
            error.add_note(
                f"also: the training cannot be told to end before this process: {cannot}"
            )
        raise
    tick()
    if "error" in box:
        raise our_error(box["error"])
    return box["result"].return_value


def _take_along(trainer: TorchTrainer, setup: TrainSetup, over: threading.Event) -> None:
    """End the training, which sets ``over``."""
    leave(setup.run_dir, setup.name)
    if over.wait(LEAVE_S):  # else it is told for as long as it takes
        has_left(setup.run_dir, setup.name)
        ask_for_no_nodes(trainer.train_run_context.run_id)


def _train_worker(config: dict[str, Any]) -> FitResult:
    """Runs in each Train worker."""
    setup: TrainSetup = ray.get(config["setup"])
    limit = batch_limit(verdicts(setup.memory, setup.name))
    began = time.time()
    with _leases(setup) as guard:
        if _all(not is_younger(guard, began)) or not _gives_way(setup):
            return _train(setup, limit)
    # No error of ours: Ray Train starts the group again, behind the memory actors that are there now.
    raise RuntimeError("a node's memory actor came after its worker; the workers begin anew")


def _leases(setup: TrainSetup) -> AbstractContextManager[Guard]:
    say = log_to(setup.run_dir)
    if ray_train.get_context().get_world_size() == 1:
        return budgeted(setup.memory, setup.name, say=say)
    return budgeted_together(setup.memory, setup.name, _all, say=say)


def _all(mine: bool) -> bool:
    """Whether every worker of the group says yes; all of them ask."""
    import torch
    import torch.distributed as dist
    from ray.train.torch import get_device

    if ray_train.get_context().get_world_size() == 1:
        return mine
    # A sum of noes: the group's backend decides where its tensors live.
    noes = torch.tensor([0 if mine else 1], device=get_device())
    dist.all_reduce(noes)
    return int(noes) == 0


def _gives_way(setup: TrainSetup) -> bool:
    """Once a call: an actor that ended itself meanwhile must not use up all restarts."""
    marker = setup.run_dir / FOLDER / f"{setup.name}.gave-way"
    if not _all(not marker.exists()):  # and nobody writes it before everybody has looked
        return False
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.touch()
    return True


def _train(setup: TrainSetup, batch_limit: int | None) -> FitResult:
    import torch
    from ray.train.torch import get_device

    if setup.torch_threads:  # Ray sets OMP_NUM_THREADS=1 for workers of less than two CPUs
        torch.set_num_threads(setup.torch_threads)
    context = ray_train.get_context()
    rank, world, shards = context.get_world_rank(), context.get_world_size(), setup.shards
    say = log_to(setup.run_dir)
    assert shards is not None
    if rank == 0:
        shards.workers_are_in()
        note_training(setup.run_dir, True)
    ways = shards.words(turn=rank)
    if ways:
        say(f"rank {rank} {ways}")
    stalls = Stalls()
    stored = partial(shards.open_rows, turn=rank, say=say, stalls=stalls)
    ctx = WorkerContext(
        rank=rank,
        world=world,
        device=str(get_device()),
        run_dir=setup.run_dir,
        report=lambda metrics: ray_train.report(metrics),
        should_stop=lambda: rank == 0 and stop_wished(setup.run_dir),
        say=say,
        open_rows=RowOpener(
            setup.decoders,
            setup.memory,
            name=f"decoder-{rank}-{secrets.token_hex(3)}",  # verdicts outlive a group of workers
            say=say,
            otherwise=stored,
            stalls=stalls,
        ),
    )
    shard = ray_train.get_dataset_shard("train")

    def slices(start: Cursor) -> Iterator[StepSlice]:
        for part in read_slices(shard):
            if (part.epoch, part.step) >= (start.epoch, start.step):
                yield part

    return fit(setup.task, setup.cfg, ctx, slices, batch_limit=batch_limit)
