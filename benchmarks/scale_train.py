"""The training of benchmarks/scale.py: `RayRunner.fit` as it is, with a task whose loss sleeps.

Real: Ray Train's group and reports, Ray Data's descriptors, the gather engine, DDP's all-reduce of a
small model, a validation, a checkpoint and a report an epoch, the memory actors. Not real: the
arithmetic, which is a sleep beside a model of some 33,000 parameters.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from raypipe.cluster.runner import RayRunner
from raypipe.store import FeatureStore
from raypipe.stream import ArraySource
from raypipe.train import TrainConfig

BATCH = 16
# Small: its arithmetic would run on this machine's cores, where it stands for a GPU's.
HIDDEN = 64


@dataclass(frozen=True)
class SleepTask:
    """Rows of ``store`` (n, T, D) float16; a batch takes ``step_s``.

    Weak scaling: ``steps`` batches an epoch for each of ``nodes`` workers, and one to validate.
    begun : a folder, where each worker leaves a file when it has its first batch.
    """

    store: Path
    begun: Path
    nodes: int
    steps: int
    step_s: float

    @property
    def train_rows(self) -> np.ndarray:
        return np.arange(BATCH * self.nodes * self.steps, dtype=np.int64)

    @property
    def val_rows(self) -> np.ndarray:
        first = BATCH * self.nodes * self.steps
        return np.arange(first, first + BATCH * self.nodes, dtype=np.int64)

    def build_model(self) -> nn.Module:
        tokens, dim = FeatureStore.open(self.store).locator().shape[1:]
        return nn.Sequential(
            nn.Flatten(), nn.Linear(tokens * dim, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)
        )

    def sources(self) -> Mapping[str, ArraySource]:
        return {"x": ArraySource.of_locator(FeatureStore.open(self.store).locator())}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        with suppress(FileExistsError):
            (self.begun / str(os.getpid())).touch(exist_ok=False)
        time.sleep(self.step_s)
        return model(batch["x"].float()).square().mean(1)

    def val_sums(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"loss": self.loss(model, batch).double().sum()}

    def val_metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {"val_loss": float(sums["loss"]) / len(self.val_rows)}

    def checkpoint_blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return []


@dataclass(frozen=True)
class Rate:
    """Rows a second over whole epochs, validation, checkpoint and report included.

    in_epoch_rows_per_s : between the first step of an epoch and its last; start_s : from the call
    until the last worker had its first batch in hand.
    """

    rows_per_s: float
    in_epoch_rows_per_s: float
    start_s: float


def run(
    runner: RayRunner,
    store: Path,
    run_dir: Path,
    *,
    nodes: int,
    step_s: float,
    steps: int,
    epochs: int,
) -> Rate:
    """The rate with a worker on each of ``nodes`` nodes; the first epoch is start-up."""
    begun = run_dir.with_name(f"{run_dir.name}-begun")
    begun.mkdir(parents=True)
    task = SleepTask(store, begun, nodes, steps, step_s)
    cfg = TrainConfig(epochs=epochs + 1, batch_size=BATCH, lr=1e-3, predict_memory=False)
    called = time.time()
    runner.fit(task, cfg, run_dir, workers=nodes, device="cpu")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    ends = [record["seconds"] for record in records if record["kind"] == "epoch"]
    each = [
        [r["seconds"] for r in records if r["kind"] == "step" and r["epoch"] == epoch]
        for epoch in range(1, epochs + 1)
    ]
    rows = BATCH * nodes
    return Rate(
        rows_per_s=rows * steps * epochs / (ends[-1] - ends[0]),
        # A step is logged when the next one is under way, but for an epoch's last.
        in_epoch_rows_per_s=rows * (steps - 2) * epochs / sum(e[-1] - e[0] for e in each),
        start_s=max(file.stat().st_mtime for file in begun.iterdir()) - called,
    )
