"""A task small enough to train in milliseconds, and ways to run `fit` on it, alone or as two."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from raypipe.stream import ArraySource
from raypipe.train import (
    FitResult,
    TrainConfig,
    WorkerContext,
    checkpoint,
    fit,
    load_model_state,
    training_plan,
)
from raypipe.train.footprint import Footprint, Line
from raypipe.train.planner import Plan, Prediction
from raypipe.train.techniques import Techniques

N_TRAIN, N_VAL, DIM, OUT = 43, 7, 6, 3


class Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, scale: float | Tensor = 1.0) -> Tensor:
        return x + self.dropout(torch.tanh(self.linear(x))) * scale


class ToyModel(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.head = nn.Linear(DIM, OUT)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.head(x)


class ConvModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, OUT, 1)

    def forward(self, x: Tensor) -> Tensor:
        assert self.conv.weight.is_contiguous(memory_format=torch.channels_last)
        return self.conv(x.view(-1, 2, 1, DIM // 2)).mean((2, 3))


@dataclass(frozen=True)
class ToyTask:
    """Predict y (3,) float32 from x (6,) float16; per-row MSE."""

    data: Path
    dropout: float = 0.0
    n_train: int = N_TRAIN
    n_val: int = N_VAL
    conv: bool = False
    poison_row: int = -1
    fingerprint: str = ""

    @property
    def train_rows(self) -> np.ndarray:
        return np.arange(self.n_train, dtype=np.int64)

    @property
    def val_rows(self) -> np.ndarray:
        return np.arange(N_TRAIN, N_TRAIN + self.n_val, dtype=np.int64)

    def build_model(self) -> nn.Module:
        return ConvModel() if self.conv else ToyModel(self.dropout)

    def sources(self) -> Mapping[str, ArraySource]:
        found = {name: ArraySource.npy(self.data / f"{name}.npy") for name in ("x", "y", "row")}
        return found | {"y": replace(found["y"], fingerprint=self.fingerprint)}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        per_row = (model(batch["x"].float()).float() - batch["y"]).square().mean(1)
        if self.poison_row >= 0:
            per_row = torch.where(batch["row"] == self.poison_row, torch.nan, 1.0) * per_row
        return per_row

    def val_sums(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        per_row = (model(batch["x"].float()).float() - batch["y"]).square().mean(1)
        n = torch.tensor(float(len(per_row)), dtype=torch.float64)
        return {"loss": per_row.double().sum(), "n": n, "rows": batch["row"].double().sum()}

    def val_metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {
            "val_loss": float(sums["loss"] / sums["n"]),
            "val_n": float(sums["n"]),
            "val_rows": float(sums["rows"]),
        }

    def checkpoint_blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return list(model.blocks) if isinstance(model, ToyModel) else []


def write_toy(folder: Path) -> ToyTask:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(5)
    n = N_TRAIN + N_VAL
    x = rng.standard_normal((n, DIM)).astype(np.float16)
    y = x.astype(np.float32) @ rng.standard_normal((DIM, OUT)).astype(np.float32)
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    np.save(folder / "row.npy", np.arange(n, dtype=np.int64))
    return ToyTask(folder)


def config(**options: Any) -> TrainConfig:
    defaults: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 8,
        "lr": 1e-2,
        "clip_norm": 1.0,
        "step_size": 1,
        "gamma": 0.5,
        "predict_memory": False,  # its own tests turn it on; a fit would take ten times as long
    }
    return TrainConfig(**(defaults | options))


def run(
    task: ToyTask,
    cfg: TrainConfig,
    run_dir: Path,
    *,
    resume: bool = True,
    batch_limit: int | None = None,
    rank: int = 0,
    world: int = 1,
    **context: Any,
) -> FitResult:
    """`fit` with the plan dealt in this process, as a local runner does it."""
    ctx = WorkerContext(
        **({"run_dir": run_dir, "rank": rank, "world": world, "say": lambda text: None} | context)
    )
    plan = training_plan(task.train_rows, cfg, world, run_dir if resume else None)
    return fit(
        task,
        cfg,
        ctx,
        lambda start: plan.slices(rank, world, start),
        resume=resume,
        batch_limit=batch_limit,
    )


class Clock:
    """A clock whose second is a step: ``tick`` is a should_stop that never says so."""

    def __init__(self, rate: float = 1.0, then: Callable[[], bool] | None = None) -> None:
        self.now, self.rate, self.then = 0.0, rate, then

    def __call__(self) -> float:
        return self.now

    def tick(self) -> bool:
        self.now += self.rate
        return self.then() if self.then else False


class StopAfter:
    """A should_stop that says so from its n-th question on."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


class Killed(BaseException):
    """Stands for SIGKILL where a real one would take the test with it: no handler runs on it."""


class KillAfter(StopAfter):
    """A should_stop that dies at its n-th question: nothing more is written."""

    def __call__(self) -> bool:
        if super().__call__():
            raise Killed
        return False


def losses(run_dir: Path, kind: str = "step") -> list[float]:
    """The run's losses from metrics.jsonl, in file order."""
    key = "loss" if kind == "step" else "val_loss"
    return [r[key] for r in records(run_dir) if r["kind"] == kind]


def grad_norms(run_dir: Path) -> list[float]:
    """Norms before clipping: AdamW and clipping would both hide a gradient of the wrong size."""
    return [r["grad_norm"] for r in records(run_dir) if r["kind"] == "step"]


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def same_run(a: Path, b: Path) -> None:
    """Same log (but for the clock), same last and best weights, to the bit."""

    def timeless(folder: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in r.items() if k != "seconds"} for r in records(folder)]

    assert timeless(a) == timeless(b)
    for name in ("last", "best"):
        ours, theirs = load_model_state(a / name), load_model_state(b / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def _worker(rank: int, world: int, store: str, work: Callable[[int, int], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        work(rank, world)
    finally:
        dist.destroy_process_group()


def begin(
    work: Callable[[int, int], None], tmp_path: Path, world: int, method: str
) -> Callable[[], None]:
    """Start ``work(rank, world)`` in ``world`` processes joined by gloo; what it gives waits for them.

    method : "fork" has all that is imported at once, and is for processes without threads.
    """
    store = tmp_path / f"rendezvous-{len(list(tmp_path.glob('rendezvous-*')))}"
    given = (world, str(store), work)
    context = mp.start_processes(_worker, given, nprocs=world, join=False, start_method=method)

    def wait() -> None:
        while not context.join():
            pass

    return wait


def spawn(work: Callable[[int, int], None], tmp_path: Path, world: int = 2) -> None:
    """Run ``work(rank, world)`` in ``world`` new processes joined by gloo."""
    begin(work, tmp_path, world, "spawn")()


class FakeGuard:
    """A memory guard that is under pressure at the n-th boundaries of ``at`` (from 0)."""

    budget_bytes = None

    def __init__(self, *at: int) -> None:
        self.at, self.asked = at, 0
        self.batches: list[int] = []
        self.phases: set[str] = set()

    def pressure(self) -> bool:
        self.asked += 1
        return self.asked - 1 in self.at

    def note(self, *, batch: int | None = None, phase: str | None = None) -> None:
        self.batches += [batch] if batch is not None else []
        self.phases |= {phase} if phase is not None else set()


class _TooLarge(torch.autograd.Function):
    """The identity, whose backward runs out of memory for more than ``rows`` rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int) -> Tensor:
        ctx.rows = rows
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if len(grad) > ctx.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 MiB. Advice.")
        return grad, None


class SmallDeviceModel(ToyModel):
    """ToyModel on a device that holds ``rows`` rows: fails when half its gradients are added."""

    def __init__(self, dropout: float, rows: int) -> None:
        super().__init__(dropout)
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        x = _TooLarge.apply(self.blocks[0](x, scale=0.5), self.rows)
        return self.head(self.blocks[1](x, scale=0.5))


@dataclass(frozen=True)
class SmallDeviceTask(ToyTask):
    """Runs out of memory in ``where`` when more than ``rows`` rows are computed at once."""

    rows: int = 2
    where: str = "backward"

    def build_model(self) -> nn.Module:
        limit = self.rows if self.where == "backward" else 10**9
        return SmallDeviceModel(self.dropout, limit)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        self._check(batch, "forward")
        return super().loss(model, batch)

    def val_sums(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self._check(batch, "validation")
        return super().val_sums(model, batch)

    def _check(self, batch: Mapping[str, Tensor], where: str) -> None:
        if self.where == where and len(batch["row"]) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 MiB. Advice.")


@dataclass(frozen=True)
class LateTask(ToyTask):
    """A device (that of ``rank``, or any) that has no room for one row from the n-th loss of a process on,
    or from the n-th batch of its validation.
    """

    room_for: int = 0
    where: str = "loss"
    rank: int | None = None

    def build_model(self) -> nn.Module:
        model = super().build_model()
        model.left = self.room_for  # type: ignore[assignment]
        return model

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        found = super().loss(model, batch)  # and with it what dropout draws
        if torch.is_grad_enabled():
            self._take(model, "loss")
        return found

    def val_sums(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        found = super().val_sums(model, batch)
        self._take(model, "validation")
        return found

    def _take(self, model: nn.Module, where: str) -> None:
        if where != self.where or (self.rank is not None and self.rank != dist.get_rank()):
            return
        bare: Any = getattr(model, "module", model)
        bare.left -= 1
        if bare.left < 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 MiB. Advice.")


def saved_steps(run_dir: Path) -> int | None:
    """Of the newest checkpoint."""
    found = checkpoint.newest(run_dir)
    return found.meta["progress"]["global_step"] if found else None


def made_up(world: int = 1, **options: Any) -> Plan:
    """fp32 100 + 10 a row; channels_last the same; checkpointing 120 + 4; AMP 90 + 6; all 100 + 2."""
    lines = {
        Techniques(): (100, 10),
        Techniques(channels_last=True): (100, 10),
        Techniques(checkpointing=True): (120, 4),
        Techniques(amp="bf16"): (90, 6),
        Techniques("bf16", True, True): (100, 2),
    }
    predictions = tuple(
        Prediction(
            techniques=techniques,
            footprint=Footprint(
                static_bytes=40,
                phases={"first": (Line(fixed - 40, a_row),), "more": (Line(fixed - 35, a_row),)},
            ),
        )
        for techniques, (fixed, a_row) in lines.items()
    )
    return Plan(asked=config(**options), device="cpu", world=world, predictions=predictions)
