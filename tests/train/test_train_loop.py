"""One worker: the loop against plain torch, accumulation, precision, failures, stopping."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from train_helpers import (
    ConvModel,
    StopAfter,
    ToyModel,
    ToyTask,
    config,
    grad_norms,
    losses,
    records,
    run,
)

from raypipe.errors import ConfigError, RaypipeError, WorkerFailed
from raypipe.stream import Cursor, StepSlice, StreamPlan
from raypipe.train import TrainConfig, WorkerContext, fit, load_model_state, training_plan
from raypipe.train import rng as train_rng
from raypipe.train.precision import prepare


def plain_torch(
    task: ToyTask, cfg: TrainConfig
) -> tuple[list[float], list[float], list[float], nn.Module]:
    """(step losses, gradient norms, val losses, model): the loop that one would write by hand."""
    x = torch.from_numpy(np.load(task.data / "x.npy")).float()
    y = torch.from_numpy(np.load(task.data / "y.npy"))
    train_rng.seed_all(cfg.seed)
    model = task.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, cfg.step_size, cfg.gamma)
    plan = StreamPlan(task.train_rows, cfg.seed, cfg.batch_size * cfg.accumulate, cfg.epochs)
    steps, norms, vals = [], [], []
    for epoch in range(cfg.epochs):
        for step in range(plan.steps_per_epoch):
            rows = plan.step_rows(epoch, step)
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x[rows]), y[rows])
            loss.backward()
            assert cfg.clip_norm is not None
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm)
            norms.append(norm.item())
            optimizer.step()
            steps.append(loss.item())
        scheduler.step()
        with torch.no_grad():
            vals.append(nn.functional.mse_loss(model(x[task.val_rows]), y[task.val_rows]).item())
    return steps, norms, vals, model


@pytest.mark.parametrize("split", [{"batch_size": 16}, {"batch_size": 4, "accumulate": 4}])
def test_it_trains_as_plain_torch_does(toy: ToyTask, tmp_path: Path, split: dict[str, int]) -> None:
    with torch.random.fork_rng():
        steps, norms, vals, model = plain_torch(toy, config(**split))
    result = run(toy, config(**split), tmp_path / "run")
    assert losses(tmp_path / "run") == pytest.approx(steps, rel=2e-5)
    assert grad_norms(tmp_path / "run") == pytest.approx(norms, rel=2e-4)
    assert losses(tmp_path / "run", "epoch") == pytest.approx(vals, rel=2e-5)
    for name, weight in load_model_state(tmp_path / "run" / "last").items():
        torch.testing.assert_close(weight, model.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert result.best_val_loss == pytest.approx(min(vals), rel=2e-5)


def test_the_log_and_the_reports_say_what_happened(toy: ToyTask, tmp_path: Path) -> None:
    reports: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    said: list[str] = []
    result = run(
        toy,
        config(),
        tmp_path / "run",
        report=reports.append,
        on_step=steps.append,
        say=said.append,
    )
    lines = records(tmp_path / "run")
    assert [r["global_step"] for r in lines if r["kind"] == "step"] == list(range(18))
    assert [r["rows"] for r in lines if r["kind"] == "step"] == [8, 8, 8, 8, 8, 3] * 3
    assert [r for r in lines if r["kind"] == "epoch"] == list(result.history)
    assert [r for r in lines if r["kind"] == "step"] == steps
    assert [r["epoch"] for r in reports] == [0, 1, 2]
    assert all(Path(r["checkpoint"]).is_dir() for r in reports)
    assert lines[0]["lr"] == 0.01
    assert lines[-2]["lr"] == 0.0025
    first = [r for r in lines if r["kind"] == "step"][:6]
    mean = sum(r["loss"] * r["rows"] for r in first) / 43
    assert result.history[0]["train_loss"] == pytest.approx(mean)
    assert len(said) == 1
    assert "6 steps" in said[0]
    assert result.history[0]["val_n"] == 7
    assert result.history[0]["val_rows"] == sum(range(43, 50))
    assert (result.epochs, result.global_steps, result.stopped) == (3, 18, False)


def test_best_is_the_epoch_of_lowest_val_loss(toy: ToyTask, tmp_path: Path) -> None:
    cfg = config(lr=3.0, epochs=4, schedule="constant", clip_norm=None)  # it gets worse at times
    result = run(toy, cfg, tmp_path / "run")
    vals = losses(tmp_path / "run", "epoch")
    assert result.best_epoch == int(np.argmin(vals))
    assert result.best_val_loss == min(vals)
    best = toy.build_model()
    best.load_state_dict(load_model_state(tmp_path / "run"))
    x = torch.from_numpy(np.load(toy.data / "x.npy")).float()[toy.val_rows]
    y = torch.from_numpy(np.load(toy.data / "y.npy"))[toy.val_rows]
    with torch.no_grad():
        assert nn.functional.mse_loss(best(x), y).item() == pytest.approx(min(vals), rel=1e-5)


def test_the_callers_generators_are_given_back(toy: ToyTask, tmp_path: Path) -> None:
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(3)
    expected = (torch.rand(1).item(), np.random.rand(), random.random())
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(3)
    run(replace(toy, dropout=0.5), config(epochs=1), tmp_path / "run")
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected


def test_the_seed_decides_everything(toy: ToyTask, tmp_path: Path) -> None:
    noisy = replace(toy, dropout=0.5)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(hash(name) % 1000)
        run(noisy, config(seed=seed, epochs=1), tmp_path / name)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_one_row_trains(toy: ToyTask, tmp_path: Path) -> None:
    run(replace(toy, n_train=1, n_val=1), config(epochs=2), tmp_path / "run")
    assert [r["rows"] for r in records(tmp_path / "run") if r["kind"] == "step"] == [1, 1]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_amp_stays_near_full_precision(toy: ToyTask, tmp_path: Path, amp: Any) -> None:
    run(toy, config(), tmp_path / "full")
    run(toy, config(amp=amp, init_scale=256.0), tmp_path / "amp")
    full, ours = losses(tmp_path / "full"), losses(tmp_path / "amp")
    assert ours != full
    assert ours == pytest.approx(full, rel=0.03)
    norms = [[r["grad_norm"] for r in records(tmp_path / n)[:5]] for n in ("full", "amp")]
    assert norms[1] == pytest.approx(norms[0], rel=0.05)  # of the true gradient, not the scaled one


def test_fp16_skips_overflowing_steps_and_finds_its_scale(toy: ToyTask, tmp_path: Path) -> None:
    run(toy, config(amp="fp16", init_scale=2.0**21), tmp_path / "run")
    steps = [r for r in records(tmp_path / "run") if r["kind"] == "step"]
    skipped = [r for r in steps if r["skipped"]]
    assert 1 <= len(skipped) < 10
    assert steps[0]["skipped"]
    scale = 2.0**21
    for step in steps:
        assert step["scale"] == scale
        scale /= 1 + step["skipped"]
    assert not steps[-1]["skipped"]


def test_fp16_that_never_finds_a_scale_stops(toy: ToyTask, tmp_path: Path) -> None:
    every_step = replace(toy, poison_row=0, n_train=1)
    with pytest.raises(WorkerFailed, match="in a row"):
        run(every_step, config(amp="fp16", epochs=50), tmp_path / "run")


def test_a_nan_loss_stops_before_the_next_checkpoint(toy: ToyTask, tmp_path: Path) -> None:
    cfg = config(checkpoint_every_steps=1)
    plan = StreamPlan(toy.train_rows, cfg.seed, 8, 3)
    poisoned = replace(toy, poison_row=int(plan.step_rows(0, 3)[2]))
    with pytest.raises(WorkerFailed, match="nan at epoch 0 step 3"):
        run(poisoned, cfg, tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 3
    for weight in load_model_state(tmp_path / "run" / "last").values():
        assert weight.isfinite().all()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_and_changes_nothing(
    toy: ToyTask, tmp_path: Path, use_reentrant: bool
) -> None:
    noisy = replace(toy, dropout=0.3)
    run(noisy, config(), tmp_path / "plain")
    cfg = config(checkpointing=True, use_reentrant=use_reentrant)
    run(noisy, cfg, tmp_path / "ours")
    assert losses(tmp_path / "ours") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)
    assert losses(tmp_path / "ours", "epoch") == pytest.approx(
        losses(tmp_path / "plain", "epoch"), rel=1e-6
    )


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients_equal_plain_ones(use_reentrant: bool, tmp_path: Path) -> None:
    calls = []
    models = [ToyModel(0.0) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].blocks[0].linear.register_forward_pre_hook(lambda *_: calls.append(1))
    cfg = config(checkpointing=True, use_reentrant=use_reentrant)
    ctx = WorkerContext(run_dir=tmp_path)
    prepared = prepare(models[1], list(models[1].blocks), cfg, ctx)
    assert prepared.checkpointed_blocks == 2
    x = torch.randn(4, 6)
    for model in models:
        model(x).square().sum().backward()
    assert len(calls) == 2  # forward, and again in the backward pass
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert set(models[0].state_dict()) == set(models[1].state_dict())
    with torch.no_grad():
        models[1](x)
    assert len(calls) == 3


def test_channels_last_only_where_convolutions_are(toy: ToyTask, tmp_path: Path) -> None:
    cfg = config(channels_last=True, epochs=1)
    said: list[str] = []
    run(replace(toy, conv=True), cfg, tmp_path / "conv", say=said.append)
    run(toy, cfg, tmp_path / "none", say=said.append)
    assert "channels_last  on" in said[0]
    assert "no 2-D convolutions" in said[1]
    prepared = prepare(ConvModel(), (), cfg, WorkerContext(run_dir=tmp_path))
    placed = prepared.place({"im": torch.zeros(2, 3, 4, 5), "y": torch.zeros(2, 3)})
    assert placed["im"].is_contiguous(memory_format=torch.channels_last)


def test_stopping_leaves_a_checkpoint_and_says_so(toy: ToyTask, tmp_path: Path) -> None:
    result = run(toy, config(), tmp_path / "run", should_stop=StopAfter(3))
    assert result.stopped
    assert result.global_steps in (3, 4)  # the answer is read one step later
    assert len(losses(tmp_path / "run")) == result.global_steps
    again = run(toy, config(), tmp_path / "run")
    assert not again.stopped
    assert len(losses(tmp_path / "run")) == 18


def feed(task: ToyTask, cfg: TrainConfig, run_dir: Path, change: Any) -> None:
    plan = training_plan(task.train_rows, cfg, 1)

    def slices(start: Cursor) -> Iterator[StepSlice]:
        return change(plan.slices(0, 1, start))

    fit(task, cfg, WorkerContext(run_dir=run_dir, say=lambda text: None), slices)


def test_a_feeder_that_loses_rows_is_caught(toy: ToyTask, tmp_path: Path) -> None:
    def drop_row(parts: Iterator[StepSlice]) -> Iterator[StepSlice]:
        for part in parts:
            yield replace(part, rows=part.rows[1:]) if part.step == 2 else part

    with pytest.raises(WorkerFailed, match="step 2 trained on 7 of its 8 rows"):
        feed(toy, config(), tmp_path / "a", drop_row)
    with pytest.raises(WorkerFailed, match="ended before epoch 0 step 4"):
        feed(
            toy,
            config(),
            tmp_path / "b",
            lambda parts: (p for p in parts if p.step < 0 or (p.step in range(4) and p.epoch < 1)),
        )
    with pytest.raises(WorkerFailed, match="gave epoch 0 step 4"):
        feed(toy, config(), tmp_path / "c", lambda parts: (p for p in parts if p.step != 3))
    with pytest.raises(WorkerFailed, match="8 rows"):
        feed(toy, config(), tmp_path / "d", lambda ps: (replace(p, global_rows=9) for p in ps))


class Bad(ToyTask):
    """ToyTask with one wrong answer."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return super().loss(model, batch).mean()


class NoValLoss(ToyTask):
    def val_metrics(self, sums: Any) -> dict[str, float]:
        return {"loss": 1.0}


class Frozen(ToyTask):
    def build_model(self) -> nn.Module:
        return super().build_model().requires_grad_(False)


@pytest.mark.parametrize(
    ("kind", "says"),
    [(Bad, "one loss a row"), (NoValLoss, "no val_loss"), (Frozen, "no parameter to train")],
)
def test_a_wrong_task_is_told_what_is_wrong(
    toy: ToyTask, tmp_path: Path, kind: type[ToyTask], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        run(kind(toy.data), config(epochs=1), tmp_path / "run")


def test_no_validation_rows_and_no_blocks_are_refused(toy: ToyTask, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hold some out"):
        run(replace(toy, n_val=0), config(), tmp_path / "a")
    with pytest.raises(ConfigError, match="no blocks"):
        run(replace(toy, conv=True), config(checkpointing=True), tmp_path / "b")


def test_a_worker_without_its_group_is_refused(toy: ToyTask, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"torch\.distributed"):
        run(toy, config(), tmp_path / "run", rank=0, world=2)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        WorkerContext(run_dir=tmp_path, rank=2, world=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_gpu_is_refused(toy: ToyTask, tmp_path: Path) -> None:
    with pytest.raises(RaypipeError, match="0 CUDA devices"):
        run(toy, config(), tmp_path / "run", device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_cuda_trains_as_the_cpu_does(toy: ToyTask, tmp_path: Path, amp: Any) -> None:
    run(toy, config(), tmp_path / "cpu")
    cfg = config(amp=amp, init_scale=256.0, checkpoint_every_steps=4)
    run(toy, cfg, tmp_path / "cuda", device="cuda:0", should_stop=StopAfter(7))
    run(toy, cfg, tmp_path / "cuda", device="cuda:0")
    tolerance = 1e-4 if amp == "off" else 0.03
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=tolerance)
