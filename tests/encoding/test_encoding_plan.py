"""Before a fit begins: dry runs, the choice within a budget, what is refused without a step."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from encoding_kit import TRAIN, World, fit_config

from raypipe.encoding import EvaluateConfig
from raypipe.encoding.run import fit
from raypipe.errors import ConfigError, InputError, MemoryBudgetExceeded, UnknownName
from raypipe.runner import LocalRunner

pytestmark = pytest.mark.usefixtures("no_page")


def test_a_dry_run_writes_nothing(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(fit_config(world, tmp_path / "run", dry_run=True, subj=()), None)
    said = capsys.readouterr().out
    assert "subject 01: 36 images to train, 4 to validate" in said and "parameters" in said
    assert not (tmp_path / "run").exists()


def test_a_dry_run_foretells_a_step_and_what_fits(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(fit_config(world, tmp_path / "run", dry_run=True), None)
    plain = capsys.readouterr().out
    for row in ("fp32 ", "checkpointing ", "AMP bf16 ", "AMP bf16 + checkpointing "):
        assert f"\n      {row}" in plain
    assert "this model has no 2-D convolutions" in plain and "--fit-gpu" not in plain
    roomy = replace(TRAIN, fit_gpu="1GiB")
    fit(fit_config(world, tmp_path / "run", dry_run=True, train=roomy), None)
    assert "--fit-gpu 1.00 GiB: fp32, micro batches of 8 x 1" in capsys.readouterr().out
    with pytest.raises(MemoryBudgetExceeded, match="of one row need at least"):
        fit(
            fit_config(world, tmp_path / "run", dry_run=True, train=replace(TRAIN, fit_gpu="9KB")),
            None,
        )
    assert not (tmp_path / "run").exists()


def test_a_fit_within_a_budget_keeps_its_choice(world: World, tmp_path: Path) -> None:
    measured = replace(TRAIN, epochs=1, predict_memory=True)
    fit(fit_config(world, tmp_path / "plain", train=measured), LocalRunner())
    small = replace(TRAIN, epochs=1, batch_size=4, accumulate=2, fit_gpu="1GiB")
    fit(fit_config(world, tmp_path / "run", train=small), LocalRunner())
    plan = json.loads((tmp_path / "run/run.json").read_text())["memory_plan"]
    assert (plan["chosen"]["batch_size"], plan["chosen"]["accumulate"]) == (8, 1)
    assert plan["chosen"]["budget_bytes"] == 1 << 30
    assert plan["chosen"]["predicted_peak_bytes"] < plan["peak_bytes"]["fp32"] * 3
    log = (tmp_path / "run/train.log").read_text()
    assert "--fit-gpu 1.00 GiB: fp32, micro batches of 8 x 1 (asked: fp32, 4 x 2)" in log
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-5)
    assert json.loads((tmp_path / "plain/run.json").read_text())["memory_plan"]["chosen"] is None


def losses_of(run_dir: Path) -> list[float]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "step"]


def test_responses_with_a_hole_are_refused_before_training(world: World, tmp_path: Path) -> None:
    changed = world.copy(tmp_path)
    path = changed.data / "subj01/training_split/training_fmri/lh_training_fmri.npy"
    array = np.load(path)
    array[5, 6] = np.nan
    np.save(path, array)
    with pytest.raises(InputError, match="image 5, vertex 6"):
        fit(fit_config(changed, tmp_path / "run"), LocalRunner())
    assert not (tmp_path / "run").exists()


def test_unknown_subject_and_bad_options(world: World, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="nearest"):
        fit(fit_config(world, tmp_path / "run", subj=("09",)), LocalRunner())
    for changes in (
        {"val_fraction": 0.0},
        {"val_fraction": 1.0},
        {"workers": 0},
        {"split_seed": -1},
    ):
        with pytest.raises(ConfigError):
            fit_config(world, tmp_path, **changes)
    with pytest.raises(ConfigError):
        EvaluateConfig(run_dir=tmp_path, eval_batch=0)


def test_help_and_planning_load_neither_torch_nor_ray() -> None:
    code = (
        "import sys, raypipe.encoding, raypipe.encoding.config, raypipe.report.commands;"
        "print([m for m in ('torch', 'ray', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
