"""Real Ray Data and Ray Train: the plan's rows arrive, the loop's losses are those without Ray."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
import train_helpers
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from real_kills import killing, workers
from torch import Tensor, nn
from train_helpers import LateTask, ToyTask, config, write_toy

from raypipe.cluster.datasets import close_open_slices, plan_dataset, read_slices
from raypipe.cluster.runner import RayRunner, wait_for_room
from raypipe.cluster.session import has_dashboard
from raypipe.cluster.shards import open_shards
from raypipe.cluster.steps import step_table
from raypipe.cluster.trainer import WithoutDashboard
from raypipe.errors import (
    ConfigError,
    DeviceUnavailable,
    Interrupted,
    MemoryBudgetExceeded,
    StoreError,
    WorkerFailed,
)
from raypipe.runner import LocalRunner
from raypipe.store import adopt, discard_store, plan_adoption, stand_in
from raypipe.store.copy_commands import ReplicateConfig, replicate
from raypipe.stream import ArraySource, Cursor, StreamPlan
from raypipe.train import training_plan

for module in (sys.modules[__name__], train_helpers):
    ray.cloudpickle.register_pickle_by_value(module)  # workers cannot import tests

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session"), pytest.mark.slow]


@pytest.fixture
def toy(tmp_path: Path) -> ToyTask:
    return write_toy(tmp_path / "data")


@pytest.fixture
def runner() -> RayRunner:
    return RayRunner(joined=False, on_event=print)


def records(run_dir: Path, kind: str) -> list[dict[str, float]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in records(run_dir, "step")]


@given(
    n=st.integers(1, 60),
    per_step=st.integers(1, 20),
    epochs=st.integers(1, 3),
    world=st.integers(1, 4),
    data=st.data(),
)
@settings(deadline=None)
def test_blocks_of_descriptors_are_the_plan(
    n: int, per_step: int, epochs: int, world: int, data: st.DataObject
) -> None:
    plan = StreamPlan(np.arange(n), 3, per_step, epochs)
    total = epochs * plan.steps_per_epoch
    lo = data.draw(st.integers(0, total - 1))
    hi = data.draw(st.integers(lo + 1, total))
    for rank in range(world):
        table = step_table(plan, rank, world, lo, hi).to_pylist()
        whole = list(plan.slices(rank, world, Cursor()))[lo:hi]
        assert [(r["epoch"], r["step"], r["global_rows"], r["rows"]) for r in table] == [
            (s.epoch, s.step, s.global_rows, s.rows.tolist()) for s in whole
        ]


@pytest.mark.parametrize(("world", "start"), [(1, Cursor()), (3, Cursor(1, 4))])
def test_ray_data_brings_each_rank_its_slices_in_order(world: int, start: Cursor) -> None:
    plan = StreamPlan(np.arange(1000), 1, 7, 3)
    for rank in range(world):
        shard = plan_dataset(plan, rank, world, start).iterator()
        got = [(s.epoch, s.step, s.global_rows, s.rows.tolist()) for s in read_slices(shard)]
        want = [
            (s.epoch, s.step, s.global_rows, s.rows.tolist())
            for s in plan.slices(rank, world, start)
        ]
        assert got == want


def test_a_stream_left_open_is_closed_and_starts_no_second_ray(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shard = plan_dataset(StreamPlan(np.arange(1000), 1, 7, 3), 0, 1, Cursor()).iterator()
    left, other = read_slices(shard), read_slices(shard)
    next(left)
    with monkeypatch.context() as patch:  # ended by somebody else than `open_session`
        patch.setattr(ray, "is_initialized", lambda: False)
        with pytest.raises(WorkerFailed, match="inside the session"):
            next(other)
    close_open_slices()
    assert list(left) == []


@dataclass(frozen=True)
class StoreTask(ToyTask):
    """Takes x from a store."""

    x: Path = Path()

    def sources(self) -> Mapping[str, ArraySource]:
        return {"x": ArraySource.of_locator(stand_in(self.x))} | {
            name: source for name, source in super().sources().items() if name != "x"
        }


def test_one_ray_worker_trains_as_no_ray_does_on_this_nodes_copy_of_a_store(
    toy: ToyTask, runner: RayRunner, tmp_path: Path
) -> None:
    """What the shared path holds is spoilt after the copy was made: training must not touch it."""
    shared = tmp_path / "shared" / "x.npy"
    shared.parent.mkdir()
    shared.write_bytes((toy.data / "x.npy").read_bytes())
    adopt(plan_adoption(shared))
    replicate(ReplicateConfig(store=shared, to=tmp_path / "nvme", margin="0"))
    with shared.open("r+b") as file:
        file.seek(-np.load(toy.data / "x.npy").nbytes, os.SEEK_END)
        file.write(bytes(np.load(toy.data / "x.npy").nbytes))
    task, cfg = StoreTask(toy.data, x=shared), config()
    by_ray = runner.fit(task, cfg, tmp_path / "ray", device="cpu")
    LocalRunner().fit(toy, cfg, tmp_path / "local", device="cpu")
    np.testing.assert_allclose(losses(tmp_path / "ray"), losses(tmp_path / "local"), rtol=1e-6)
    assert by_ray.epochs == 3
    assert by_ray.best_val_loss == pytest.approx(
        min(r["val_loss"] for r in records(tmp_path / "local", "epoch")), rel=1e-6
    )
    log = (tmp_path / "ray" / "train.log").read_text()
    assert f"x: local copy {tmp_path / 'nvme' / 'x.npy'}; y: shared {toy.data / 'y.npy'}" in log


def test_a_last_validation_that_is_owed_is_done_where_no_step_is_left(
    toy: ToyTask, runner: RayRunner, tmp_path: Path
) -> None:
    """Ray's own stream is empty then."""
    late = LateTask(toy.data, room_for=2, where="validation")
    with pytest.raises(MemoryBudgetExceeded, match="one row at once"):
        LocalRunner().fit(late, config(), tmp_path / "run", device="cpu")
    assert len(records(tmp_path / "run", "epoch")) == 2
    assert runner.fit(toy, config(), tmp_path / "run", device="cpu").epochs == 3
    LocalRunner().fit(toy, config(), tmp_path / "whole", device="cpu")
    for key in ("val_loss", "train_loss"):
        ours, theirs = (
            [record[key] for record in records(tmp_path / name, "epoch")]
            for name in ("run", "whole")
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert len(losses(tmp_path / "run")) == len(losses(tmp_path / "whole"))


def test_a_copy_that_the_catalog_lists_and_nobody_has_is_named(
    toy: ToyTask, tmp_path: Path
) -> None:
    adopt(plan_adoption(toy.data / "x.npy"))
    replicate(ReplicateConfig(store=toy.data / "x.npy", to=tmp_path / "nvme", margin="0"))
    sources = StoreTask(toy.data, x=toy.data / "x.npy").sources()
    discard_store(tmp_path / "nvme" / "x.npy")
    with (
        open_shards(sources, batch_rows=8, workers=1, memory=None, say=print) as shards,
        pytest.raises(StoreError, match=r"lists a copy on .* raypipe store replicate"),
    ):
        shards.open_rows(sources["x"], turn=0, say=print)


@dataclass(frozen=True)
class SlowTask(ToyTask):
    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        time.sleep(0.2)
        return super().loss(model, batch)


@dataclass(frozen=True)
class RecordingTask(SlowTask):
    """Notes the rows of every micro batch that it trains on, in a file a process."""

    seen: Path = Path()

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if torch.is_grad_enabled():
            with (self.seen / f"{os.getpid()}").open("a") as file:
                file.write(" ".join(map(str, batch["row"].tolist())) + "\n")
        return super().loss(model, batch)


def test_a_killed_train_worker_goes_on_from_the_last_checkpoint(
    toy: ToyTask, runner: RayRunner, tmp_path: Path
) -> None:
    (tmp_path / "seen").mkdir()
    task = RecordingTask(toy.data, dropout=0.2, seen=tmp_path / "seen")
    cfg = config(checkpoint_every_steps=3)
    with killing(
        (tmp_path / "run" / "last" / "meta.json").exists, lambda _: workers("RayTrainWorker")[0]
    ) as killed:
        result = runner.fit(task, cfg, tmp_path / "run", device="cpu")
    assert result.epochs == 3
    LocalRunner().fit(ToyTask(toy.data, dropout=0.2), cfg, tmp_path / "unbroken", device="cpu")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "unbroken"), rtol=1e-5)
    # The killed worker saw the plan's first steps; its successor those from the checkpoint to the
    # end, which leaves out none and has no other.
    plan = training_plan(toy.train_rows, cfg, 1)
    steps = [part.rows.tolist() for part in plan.slices(0, 1, Cursor())]
    seen = {
        int(file.name): [list(map(int, line.split())) for line in file.read_text().splitlines()]
        for file in (tmp_path / "seen").iterdir()
    }
    first, (second,) = seen.pop(killed.pid), seen.values()
    assert first == steps[: len(first)]
    assert second == steps[len(steps) - len(second) :]
    resumed_at = len(steps) - len(second)
    assert resumed_at % 3 == 0 and 0 < resumed_at <= len(first)


@pytest.mark.usefixtures("heeded_sigint")
def test_ctrl_c_saves_the_step_on_every_worker_and_goes_on(
    toy: ToyTask, runner: RayRunner, tmp_path: Path
) -> None:
    task, cfg = SlowTask(toy.data), config(batch_size=4)
    (tmp_path / "run").mkdir()
    metrics = tmp_path / "run" / "metrics.jsonl"
    with (
        pytest.raises(Interrupted, match="same command goes on"),
        killing(
            lambda: metrics.exists() and metrics.stat().st_size,
            lambda _: os.getpid(),
            by=signal.SIGINT,
        ),
    ):
        runner.fit(task, cfg, tmp_path / "run", workers=2, device="cpu")
    assert 0 < len(losses(tmp_path / "run")) < 18
    alone = LocalRunner()
    assert alone.fit(toy, config(batch_size=8), tmp_path / "run", device="cpu").epochs == 3
    alone.fit(toy, config(batch_size=8), tmp_path / "unbroken", device="cpu")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "unbroken"), rtol=1e-4)


def test_our_errors_reach_the_driver_as_they_are(
    toy: ToyTask, runner: RayRunner, tmp_path: Path
) -> None:
    with pytest.raises(WorkerFailed, match="the loss is nan"):
        runner.fit(ToyTask(toy.data, poison_row=4), config(), tmp_path / "nan", device="cpu")
    LocalRunner().fit(toy, config(epochs=1), tmp_path / "run", device="cpu")
    with pytest.raises(ConfigError, match="other options"):
        runner.fit(toy, config(epochs=1, lr=3e-2), tmp_path / "run", device="cpu")


def test_two_workers_begin_anew_where_told_and_equal_one_with_twice_the_batch(
    toy: ToyTask, runner: RayRunner, tmp_path: Path
) -> None:
    cfg = config(batch_size=4)
    other = config(batch_size=4, epochs=1, lr=3e-2)
    LocalRunner().fit(toy, other, tmp_path / "two", device="cpu")  # whose options do not resume
    runner.fit(toy, cfg, tmp_path / "two", workers=2, device="cpu", resume=False)
    # Without Ray, which starts nothing; a test above shows that it is the same.
    LocalRunner().fit(toy, config(batch_size=8), tmp_path / "one", device="cpu")
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)


def test_nobody_asks_a_dashboard_that_is_not_there() -> None:
    """Ray's cleaner of placement groups would: for 12 s at the end of a training, or of another Ray."""
    assert not has_dashboard()
    given = {"train_loop_per_worker": print, "scaling_config": ScalingConfig(num_workers=1)}
    usual, ours = (
        {type(one) for one in kind(**given)._create_default_callbacks()}
        for kind in (TorchTrainer, WithoutDashboard)
    )
    assert usual - ours == {PlacementGroupCleanerCallback} and ours < usual


def test_a_cluster_without_room_is_named_and_not_waited_for_in_silence() -> None:
    said: list[str] = []
    with pytest.raises(DeviceUnavailable, match=r"2 training worker\(s\) need 2 GPU, it has 0"):
        wait_for_room({"CPU": 0.1, "GPU": 1.0}, 2, said.append, timeout_s=0.5, look_every_s=0.1)
    assert len(said) == 1
    wait_for_room({"CPU": 0.1}, 2, said.append)
    assert len(said) == 1


def test_cuda_without_a_gpu_is_refused_by_the_ray_runner(runner: RayRunner) -> None:
    with pytest.raises(DeviceUnavailable, match="--device cuda"):
        runner.resolve_device("cuda")
    assert runner.resolve_device("auto") == "cpu"
