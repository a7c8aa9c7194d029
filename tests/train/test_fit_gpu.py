"""A fit under --fit-gpu: it trains what the planner chose, the same steps, and keeps it when it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from train_helpers import StopAfter, ToyTask, config, grad_norms, losses, records, run

from raypipe.errors import ConfigError, MemoryBudgetExceeded
from raypipe.train.planner import PLAN_FILE, predict

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_fit_takes_the_choice_and_trains_the_same_steps(toy: ToyTask, tmp_path: Path) -> None:
    run(toy, config(), tmp_path / "plain")
    plan = predict(toy, config(), CPU)
    fp32 = plan.predictions[0]
    smallest = min(plan.peak_bytes(p, 8) for p in plan.predictions if p.footprint)
    budget = min(plan.peak_bytes(fp32, 2), smallest - 1)  # nothing holds 8 rows: fewer it must be
    said: list[str] = []
    cfg = config(fit_gpu=str(budget) + "B")
    run(toy, cfg, tmp_path / "ours", say=said.append)
    saved = json.loads((tmp_path / "ours" / PLAN_FILE).read_text())
    chosen = saved["chosen"]
    assert chosen["predicted_peak_bytes"] <= budget == chosen["budget_bytes"]
    assert chosen["batch_size"] * chosen["accumulate"] == 8 > chosen["batch_size"]
    assert saved["peak_bytes"]["fp32"] == plan.peak_bytes(fp32, 8)
    assert "--fit-gpu" in said[0] and "micro batches of" in said[0]
    tolerance = 1e-5 if chosen["amp"] == "off" else 0.03
    assert losses(tmp_path / "ours") == pytest.approx(losses(tmp_path / "plain"), rel=tolerance)
    norms = [grad_norms(tmp_path / name)[:5] for name in ("ours", "plain")]
    assert norms[0] == pytest.approx(norms[1], rel=max(1e-4, 2 * tolerance))
    rows = [r["rows"] for r in records(tmp_path / "ours") if r["kind"] == "step"]
    assert rows == [8, 8, 8, 8, 8, 3] * 3


def test_a_resumed_run_keeps_the_amp_that_was_chosen(toy: ToyTask, tmp_path: Path) -> None:
    run(toy, config(amp="bf16"), tmp_path / "run", should_stop=StopAfter(3))
    run(toy, config(fit_gpu="1GiB"), tmp_path / "run", should_stop=StopAfter(3))
    chosen = json.loads((tmp_path / "run" / PLAN_FILE).read_text())["chosen"]
    assert (chosen["amp"], chosen["batch_size"]) == ("bf16", 8)
    with pytest.raises(ConfigError, match="amp 'bf16' -> 'off'"):
        run(toy, config(), tmp_path / "run")


def test_a_budget_below_everything_stops_before_the_first_step(
    toy: ToyTask, tmp_path: Path
) -> None:
    with pytest.raises(MemoryBudgetExceeded, match="need at least"):
        run(toy, config(fit_gpu="1KB"), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_table_can_be_left_out(toy: ToyTask, tmp_path: Path) -> None:
    said: list[str] = []
    run(toy, config(predict_memory=True), tmp_path / "a", say=said.append)
    run(toy, config(), tmp_path / "b", say=said.append)
    assert "memory of a step" in said[0] and "memory of a step" not in said[1]
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
