"""What a task may decide of epochs: rows of its own for each, which is the best, when to stop early."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from train_helpers import N_TRAIN, N_VAL, ToyTask, config, run, write_toy

from raypipe.errors import MemoryBudgetExceeded
from raypipe.runner import LocalRunner
from raypipe.train import finished
from raypipe.train.checkpoint import find_checkpoint
from raypipe.train.limit import BatchLimit
from raypipe.train.result import Progress

N = N_TRAIN + N_VAL


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


@dataclass(frozen=True)
class AnewTask(ToyTask):
    """Row ``epoch * N + row`` is that row in that epoch."""

    epoch_stride: int = N


def write_epochs(folder: Path, toy: ToyTask, scales: tuple[float, ...]) -> AnewTask:
    """``toy``'s rows once an epoch, x and y times ``scales``."""
    folder.mkdir()
    for name in ("x", "y", "row"):
        one = np.load(toy.data / f"{name}.npy")
        parts = [one if name == "row" else one * one.dtype.type(scale) for scale in scales]
        np.save(folder / f"{name}.npy", np.concatenate(parts))
    return AnewTask(folder)


def test_each_epoch_has_rows_of_its_own_and_validation_keeps_its(tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "toy")
    same = write_epochs(tmp_path / "same", toy, (1, 1, 1))
    other = write_epochs(tmp_path / "other", toy, (1, 0, 1))
    plain, alike, changed = (
        [r["loss"] for r in records(run(t, config(), tmp_path / n).run_dir, "step")]
        for n, t in (("plain", toy), ("alike", same), ("changed", other))
    )
    each = len(plain) // 3
    assert alike == plain
    assert changed[:each] == plain[:each]
    assert np.mean(changed[each : 2 * each]) < 0.2 * np.mean(plain[each : 2 * each]), (
        "zeros: no loss"
    )
    assert np.mean(changed[2 * each :]) > 0.5 * np.mean(plain[2 * each :])
    assert {r["val_rows"] for r in records(tmp_path / "changed", "epoch")} == {
        sum(range(N_TRAIN, N))
    }


@dataclass(frozen=True)
class LatestTask(ToyTask):
    """Its best epoch is the one of the largest loss."""

    def epoch_cost(self, metrics: Mapping[str, float]) -> float:
        return -metrics["val_loss"]


def test_the_task_says_which_epoch_is_best(tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "toy")
    result = run(LatestTask(toy.data), config(), tmp_path / "run")
    epochs = records(tmp_path / "run", "epoch")
    worst = max(epochs, key=lambda record: record["val_loss"])
    assert (result.best_epoch, result.best_val_loss) == (worst["epoch"], worst["val_loss"])
    best = find_checkpoint(tmp_path / "run/best").meta["progress"]["history"][-1]
    assert best["epoch"] == worst["epoch"]
    assert run(toy, config(), tmp_path / "usual").best_epoch != worst["epoch"]


def test_a_run_stops_early_and_is_then_over(tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "toy")
    task = LatestTask(toy.data)  # the first epoch stays the best
    cfg = config(epochs=9, patience=2)
    result = LocalRunner().fit(task, cfg, tmp_path / "run", device="cpu")
    assert (result.epochs, result.best_epoch, result.stopped) == (3, 0, False)
    done = finished(tmp_path / "run", cfg, result.n_parameters)
    assert done is not None and done.epochs == 3
    again = LocalRunner().fit(task, cfg, tmp_path / "run", device="cpu")
    assert again.global_steps == result.global_steps
    more = config(epochs=9, patience=4)
    assert finished(tmp_path / "run", more, 1) is None
    assert LocalRunner().fit(task, more, tmp_path / "run", device="cpu").epochs == 5


def test_what_was_learnt_is_saved_when_memory_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = write_toy(tmp_path / "toy")
    asked: list[int] = []

    def at_boundary(self: BatchLimit) -> None:
        asked.append(1)
        if len(asked) == 9:
            raise MemoryBudgetExceeded("full")

    with monkeypatch.context() as patched:
        patched.setattr(BatchLimit, "at_boundary", at_boundary)
        with pytest.raises(MemoryBudgetExceeded):
            LocalRunner().fit(toy, config(), tmp_path / "run", device="cpu")
    assert find_checkpoint(tmp_path / "run/last").meta["progress"]["global_step"] == 8
    LocalRunner().fit(toy, config(), tmp_path / "run", device="cpu")
    LocalRunner().fit(toy, config(), tmp_path / "whole", device="cpu")
    broken, whole = ([r["loss"] for r in records(tmp_path / n, "step")] for n in ("run", "whole"))
    assert broken == whole


def test_a_checkpoint_from_before_costs_goes_on() -> None:
    assert Progress(best_val_loss=0.5, best_epoch=1).best_cost == 0.5
