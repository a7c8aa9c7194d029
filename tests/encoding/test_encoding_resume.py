"""Fits in a folder that holds one: they go on, are done already, start over, or are refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoding_kit import TRAIN, World, fit_config

from raypipe.encoding import EvaluateConfig, FitConfig, ModelConfig
from raypipe.encoding.assess import evaluate
from raypipe.encoding.prepare import prepare
from raypipe.encoding.run import fit
from raypipe.errors import ConfigError, InputError, NoSpace, StoreLocked, WorkerFailed
from raypipe.runner import LocalRunner
from raypipe.store import space
from raypipe.train.checkpoint import on_disk_bytes

pytestmark = pytest.mark.usefixtures("no_page")


def test_a_run_goes_on_to_the_same_losses(world: World, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(fit_config(world, whole), LocalRunner())
    fit(fit_config(world, parts, train=replace(TRAIN, epochs=1)), LocalRunner())
    fit(fit_config(world, parts), LocalRunner())

    def losses(run_dir: Path) -> list[float]:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line).get("loss") or json.loads(line)["val_loss"] for line in lines]

    assert losses(whole) == losses(parts)


def test_a_finished_fit_is_not_done_again_and_keeps_its_record(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(fit_config(world, tmp_path), LocalRunner())
    before = (tmp_path / "run.json").read_bytes()
    first = json.loads(before)["result"]
    capsys.readouterr()
    (done,) = fit(fit_config(world, tmp_path, train=replace(TRAIN, keep=3)), LocalRunner()).subjects
    assert "subject 01: complete already, 3 epochs" in capsys.readouterr().out
    assert (tmp_path / "run.json").read_bytes() == before
    assert (done.result.epochs, done.result.best_val_loss) == (3, first["best_val_loss"])
    # Killed between the last checkpoint and the record: the result is the checkpoint's.
    (tmp_path / "run.json").write_text(json.dumps({**json.loads(before), "result": None}))
    fit(fit_config(world, tmp_path), LocalRunner())
    mended = json.loads((tmp_path / "run.json").read_text())["result"]
    assert {**mended, "seconds": 0} == {**first, "seconds": 0}
    with pytest.raises(ConfigError, match="3 epochs done, --epochs 2 is fewer"):
        fit(fit_config(world, tmp_path, train=replace(TRAIN, epochs=2)), LocalRunner())
    assert (
        fit(fit_config(world, tmp_path, resume=False), LocalRunner()).subjects[0].result.epochs == 3
    )


def test_another_run_in_the_folder_is_refused(world: World, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    fit(fit_config(world, run_dir), LocalRunner())
    wider = ModelConfig(d_model=32, heads=2, ffn=16)
    for changes, said in (
        ({"encoder": wider}, "other encoder"),
        ({"subj": ("02",)}, "other subject"),
        ({"split_seed": 1}, "another way"),
    ):
        with pytest.raises(ConfigError, match=said):
            fit(fit_config(world, run_dir, **changes), LocalRunner())
    with pytest.raises(ConfigError, match="other subjects"):
        fit(fit_config(world, run_dir, subj=("01", "02")), LocalRunner())
    (run_dir / "evaluation").mkdir()
    fit(fit_config(world, run_dir, encoder=wider, split_seed=1, resume=False), LocalRunner())
    assert not (run_dir / "evaluation").exists()  # scores of weights that are gone
    assert json.loads((run_dir / "run.json").read_text())["config"]["encoder"]["d_model"] == 32


def responses_of(world: World, hemi: str) -> Path:
    return world.data / f"subj01/training_split/training_fmri/{hemi}_training_fmri.npy"


def test_changed_responses_are_refused_by_name(world: World, tmp_path: Path) -> None:
    changed, run_dir = world.copy(tmp_path), tmp_path / "run"
    fit(fit_config(changed, run_dir, train=replace(TRAIN, epochs=1)), LocalRunner())
    before = (run_dir / "run.json").read_bytes()
    array = np.load(responses_of(changed, "rh"))
    np.save(responses_of(changed, "rh"), array[::-1].copy())
    with pytest.raises(ConfigError, match=r"run of other rh responses;.*--no-resume"):
        fit(fit_config(changed, run_dir), LocalRunner())
    assert (run_dir / "run.json").read_bytes() == before
    # The checkpoint knows by itself what it was trained on.
    (run_dir / "run.json").unlink()
    with pytest.raises(ConfigError, match="was trained on other rh than"):
        fit(fit_config(changed, run_dir), LocalRunner())
    np.save(responses_of(changed, "rh"), array)
    assert fit(fit_config(changed, run_dir), LocalRunner()).subjects[0].result.epochs == 3


def test_roi_masks_of_the_same_names_are_no_less_compared(world: World, tmp_path: Path) -> None:
    changed, run_dir = world.copy(tmp_path), tmp_path / "run"
    fit(fit_config(changed, run_dir), LocalRunner())
    path = changed.data / "subj01/roi_masks/lh.floc-faces_challenge_space.npy"
    mask = np.load(path)
    np.save(path, np.roll(mask, 1))
    with pytest.raises(ConfigError, match="run of other ROI masks"):
        fit(fit_config(changed, run_dir), LocalRunner())
    with pytest.raises(InputError, match="other ROI masks"):
        evaluate(EvaluateConfig(run_dir=run_dir, device="cpu"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"train": replace(TRAIN, lr=1.0)}, "lr"), ({"split_seed": 1}, "another way")],
)
def test_a_refused_command_leaves_the_record_alone(
    world: World, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    fit(fit_config(world, tmp_path), LocalRunner())
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ConfigError, match=said):
        fit(fit_config(world, tmp_path, **changes), LocalRunner())
    assert (tmp_path / "run.json").read_bytes() == before


class Within(LocalRunner):
    """Does ``act`` before it trains."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.act = act

    def fit(self, *args: Any, **options: Any) -> Any:
        self.act()
        return super().fit(*args, **options)


def test_starting_over_leaves_nothing_to_resume_when_it_fails(world: World, tmp_path: Path) -> None:
    def lost() -> None:
        raise WorkerFailed("the worker is gone")

    fit(fit_config(world, tmp_path), LocalRunner())
    other = {"encoder": ModelConfig(d_model=16, heads=4, ffn=16, dropout=0.0)}
    with pytest.raises(WorkerFailed):
        fit(fit_config(world, tmp_path, resume=False, **other), Within(lost))
    assert not [*tmp_path.glob("last*"), *tmp_path.glob("best*")]


def test_starting_over_that_is_refused_costs_no_weights(world: World, tmp_path: Path) -> None:
    fit(fit_config(world, tmp_path), LocalRunner())
    before = sorted(tmp_path.glob("best*"))
    with pytest.raises(ConfigError, match="--runner ray"):
        fit(fit_config(world, tmp_path, resume=False, workers=2), LocalRunner())
    assert before and sorted(tmp_path.glob("best*")) == before
    (again,) = fit(fit_config(world, tmp_path), LocalRunner()).subjects
    assert again.result.epochs == 3


def test_a_fit_of_all_and_one_of_a_subject_keep_each_other_out(
    world: World, tmp_path: Path
) -> None:
    both = fit_config(world, tmp_path / "run", subj=("01", "02"))
    first = fit_config(world, tmp_path / "run" / "subj01")

    def refused(cfg: FitConfig) -> None:
        with pytest.raises(StoreLocked, match="subj01 is being fitted by pid"):
            fit(cfg, LocalRunner())

    fit(first, Within(lambda: refused(both)))
    fit(both, Within(lambda: refused(first)))
    fit(both, LocalRunner())  # all locks were given back


def test_a_resumed_run_needs_only_what_is_not_there_yet(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {"encoder": ModelConfig(d_model=128, heads=2, ffn=512, dropout=0.0)}
    cfg = fit_config(world, tmp_path / "run", **wide, train=replace(TRAIN, epochs=2))
    fresh = prepare(cfg, "01", tmp_path / "run")
    needed, generation = fresh.missing_bytes(cfg), 12 * fresh.n_parameters()
    assert needed == fresh.disk_bytes(cfg) == 3 * generation + generation // 3
    fit(cfg, LocalRunner())
    there = on_disk_bytes(tmp_path / "run")
    assert there == pytest.approx(needed - generation, rel=0.1)
    free = int(1.2 * generation)
    monkeypatch.setattr(space, "free_bytes", lambda path: free)
    fit(fit_config(world, tmp_path / "run", **wide), LocalRunner())
    fit(fit_config(world, tmp_path / "run", **wide, resume=False), LocalRunner())
    free = int(0.8 * generation)
    with pytest.raises(NoSpace):
        fit(
            fit_config(world, tmp_path / "run", **wide, train=replace(TRAIN, epochs=4)),
            LocalRunner(),
        )
    with pytest.raises(NoSpace):
        fit(fit_config(world, tmp_path / "new", **wide), LocalRunner())
