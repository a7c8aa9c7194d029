"""Batch norm on maps of one pixel: no micro batch of one row, whatever cuts it; a refusal before
training where the steps leave no other cut.
"""

from __future__ import annotations

import importlib.util
import json
import weakref
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from train_helpers import (
    FakeGuard,
    ToyModel,
    ToyTask,
    config,
    grad_norms,
    losses,
    made_up,
    run,
    write_toy,
)

from raypipe.errors import ConfigError, MemoryBudgetExceeded
from raypipe.memory.guard import guarding
from raypipe.segment.model import build_model, spec_of
from raypipe.train import WorkerContext, choose, training_plan
from raypipe.train.engine import Engine
from raypipe.train.planner import PLAN_FILE
from raypipe.train.precision import prepare
from raypipe.train.trial import least_rows


class Pooled(ToyModel):
    """Its batch norm sees one value a row and channel, as behind a global pool."""

    def __init__(self, pixels: int) -> None:
        super().__init__(0.0)
        self.pixels, self.norm = pixels, nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return self.norm(y[:, :, None].expand(-1, -1, self.pixels)).mean(2)


@dataclass(frozen=True)
class PooledTask(ToyTask):
    pixels: int = 1

    def build_model(self) -> nn.Module:
        return Pooled(self.pixels)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each backward pass."""
    real, seen = Engine.backward, []

    def backward(self: Engine, micro: Any, batch: Any) -> Tensor:
        seen.append(len(micro.rows))
        return real(self, micro, batch)

    monkeypatch.setattr(Engine, "backward", backward)
    return seen


def test_steps_that_leave_one_row_are_refused_before_training(toy: ToyTask, tmp_path: Path) -> None:
    """43 rows in steps of 6, 7 or 14 leave one."""
    task = PooledTask(toy.data)
    for options in ({"batch_size": 6}, {"batch_size": 7, "accumulate": 2}, {"batch_size": 1}):
        with pytest.raises(ConfigError, match=r"micro batch of one row.*--batch-size"):
            run(task, config(**options), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert run(task, config(batch_size=8), tmp_path / "run").epochs == 3


def test_one_row_is_fine_where_maps_are_larger(toy: ToyTask, tmp_path: Path) -> None:
    assert run(PooledTask(toy.data, pixels=2), config(batch_size=6), tmp_path / "run").epochs == 3


ALL = "AMP bf16 + checkpointing + channels_last"


@pytest.mark.parametrize(
    ("pixels", "n_train", "name", "rows"),
    [(2, 43, "fp32", 1), (1, 42, "AMP bf16", 2), (1, 43, ALL, 4)],
)
def test_fit_gpu_chooses_what_the_model_bears(
    toy: ToyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    pixels: int, n_train: int, name: str, rows: int,
) -> None:  # fmt: skip
    """Asked for single rows in steps of 16. Twos leave one of the 11 rows of the last step, none of 10."""
    monkeypatch.setattr(choose, "predict", lambda task, cfg, *rest: made_up(**asked))
    asked = {"batch_size": 1, "accumulate": 16}
    task = PooledTask(toy.data, pixels=pixels, n_train=n_train)
    assert run(task, config(fit_gpu="116B", **asked), tmp_path / "run").epochs == 3
    chosen = json.loads((tmp_path / "run" / PLAN_FILE).read_text())["chosen"]
    assert (chosen["techniques"], chosen["batch_size"]) == (name, rows)
    steps = training_plan(task.train_rows, config(**asked), 1)
    tight = choose.choose(made_up(**asked), task, steps, 115)
    assert (tight.name, tight.cfg.batch_size) == (name, rows)
    if pixels == 1 and n_train == 43:
        with pytest.raises(
            MemoryBudgetExceeded, match=r"of 4 rows, this model's .* at least 113 B"
        ):
            choose.choose(made_up(**asked), task, steps, 112)


def test_fit_gpu_leaves_what_no_size_mends_to_the_refusal(toy: ToyTask, tmp_path: Path) -> None:
    """A step of one row."""
    with pytest.raises(
        ConfigError, match="a step of 1 rows over 1 workers has a micro batch of one"
    ):
        run(PooledTask(toy.data, n_train=33), config(fit_gpu="1GiB"), tmp_path / "run")


def test_synchronised_norms_bear_one_row_of_each_worker(toy: ToyTask) -> None:
    """43 rows in steps of 8 leave two for one worker, and one for the other: ones would leave that one
    without a row, and norms of its own bear nothing, so it is left to the refusal.
    """
    task, asked = PooledTask(toy.data), {"batch_size": 1, "accumulate": 4}
    for sync, rows in ((True, 2), (False, 1)):
        cfg = config(sync_batch_norm=sync, **asked)
        plan = made_up(2, sync_batch_norm=sync, **asked)
        steps = training_plan(task.train_rows, cfg, 2)
        assert choose.choose(plan, task, steps, 116).cfg.batch_size == rows
        if sync:
            said = "of 2 rows, SyncBN over 2 workers bears no fewer, need at least 107 B"
            with pytest.raises(MemoryBudgetExceeded, match=said):
                choose.choose(plan, task, steps, 104)


def test_the_model_that_was_asked_is_gone_when_its_memory_is_given_back(
    toy: ToyTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: what is still held there, CUDA's cache does not give back."""
    alive: list[bool] = []
    asked: list[weakref.ref[nn.Module]] = []

    def least(task: Any, cfg: Any, ctx: Any, prepared: Any) -> int:
        asked.append(weakref.ref(prepared))
        return 2

    monkeypatch.setattr(choose, "prepare", lambda module, *rest: module)
    monkeypatch.setattr(choose, "least_rows", least)
    monkeypatch.setattr(choose.rng, "preserved", lambda device: nullcontext())
    monkeypatch.setattr(choose, "relieve", lambda: alive.append(asked[0]() is not None))
    plan = replace(made_up(), device="cuda")
    assert choose._asked(PooledTask(toy.data), config(), plan, None) == (2, False)
    assert alive == [False]


class SqueezedTask(PooledTask):
    """Cannot bear one row, which its steps never have."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        if len(batch["x"]) == 1:
            raise IndexError("dimension specified as 0 but tensor has no dimensions")
        return super().loss(model, batch)


def test_a_trial_refuses_nothing_that_no_step_needs(toy: ToyTask, tmp_path: Path) -> None:
    task, ctx = SqueezedTask(toy.data, pixels=2), WorkerContext(run_dir=tmp_path)
    prepared = prepare(task.build_model(), (), config(), ctx)
    assert least_rows(task, config(), ctx, prepared) == 2
    assert run(task, config(batch_size=8), tmp_path / "run").epochs == 3


def test_short_memory_leaves_two_rows_at_once(
    toy: ToyTask, tmp_path: Path, sizes: list[int]
) -> None:
    with guarding(FakeGuard(*range(100))):
        run(PooledTask(toy.data), config(), tmp_path / "run")
    assert sizes[:6] == [4] * 6
    assert set(sizes[6:]) == {2, 3}  # the last step has three rows: not two and one
    assert sum(sizes) == 3 * 43


@pytest.mark.skipif(
    importlib.util.find_spec("segmentation_models_pytorch") is None, reason="no raypipe[smp]"
)
@pytest.mark.parametrize(
    ("model", "least"), [("smp:DeepLabV3Plus:resnet18", 2), ("smp:Unet:resnet18", 1)]
)
def test_a_library_network_that_pools_needs_two(tmp_path: Path, model: str, least: int) -> None:
    class Library(ToyTask):
        def build_model(self) -> nn.Module:
            return build_model(spec_of(model, in_channels=1, classes=1))

        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            images = batch["x"].float().mean(1)[:, None, None, None].expand(-1, 1, 64, 64)
            found: Tensor = model(images).square().mean((1, 2, 3))
            return found

    task, ctx = Library(write_toy(tmp_path / "toy").data), WorkerContext(run_dir=tmp_path)
    prepared = prepare(task.build_model(), (), config(), ctx)
    before = {name: value.clone() for name, value in prepared.module.state_dict().items()}
    assert least_rows(task, config(), ctx, prepared) == least
    for name, value in prepared.module.state_dict().items():
        assert torch.equal(value, before[name])


def _on_nccl(rank: int, store: str, task: PooledTask, root: Path) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        for name, rows in (("two", 4), ("uneven", 2)):
            cfg = config(sync_batch_norm=True, batch_size=rows, accumulate=4 // rows)
            run(task, cfg, root / name, rank=rank, world=2, device=f"cuda:{rank}")
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_syncbn_ends_with_uneven_steps_and_equals_one_worker(tmp_path: Path) -> None:
    """37 rows in steps of 8 leave 5: three and two, at two rows at once two passes on both ranks."""
    task = replace(PooledTask(write_toy(tmp_path / "toy").data, pixels=2), n_train=37)
    mp.spawn(_on_nccl, args=(str(tmp_path / "store"), task, tmp_path), nprocs=2, join=True)
    run(task, config(), tmp_path / "one", device="cuda:0")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert grad_norms(tmp_path / "two") == pytest.approx(grad_norms(tmp_path / "one"), rel=1e-3)
    assert len(losses(tmp_path / "uneven")) == len(losses(tmp_path / "one"))
