"""Fit, evaluate and predict for real, in this process: numbers against a forward and scikit-learn,
runs that go on or are refused, files that are whole.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from encoding_kit import FEATURE, PLANTED, World, extract_toy, tokens_of, write_store
from sklearn.feature_selection import r_regression

from raypipe.encoding import EvaluateConfig, FitConfig, ModelConfig, PredictConfig
from raypipe.encoding.apply import open_applied
from raypipe.encoding.assess import evaluate, predict
from raypipe.encoding.predictions import PredictionFile
from raypipe.encoding.prepare import prepare
from raypipe.encoding.run import fit
from raypipe.encoding.score import Scores, summarise
from raypipe.errors import (
    ConfigError,
    InputError,
    MemoryBudgetExceeded,
    MissingInput,
    NoSpace,
    StoreLocked,
    UnknownName,
    WorkerFailed,
)
from raypipe.memory.config import MemoryFlags
from raypipe.memory.guard import InProcessGuard
from raypipe.memory.history import read_history
from raypipe.runner import LocalRunner
from raypipe.store import space
from raypipe.stream import Gatherer
from raypipe.train import TrainConfig, checkpoint
from raypipe.train.checkpoint import on_disk_bytes
from raypipe.units import format_bytes

V = PLANTED.vertices_per_hemi
TRAIN = TrainConfig(epochs=3, batch_size=8, lr=3e-3, schedule="constant", clip_norm=1.0)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(world: World, run_dir: Path, **changes: Any) -> FitConfig:
    fields = {
        "data_dir": world.data,
        "features_dir": world.features,
        "feature": FEATURE,
        "run_dir": run_dir,
        "subj": ("01",),
        "encoder": ModelConfig(d_model=16, heads=2, ffn=16, dropout=0.0),
        "train": TRAIN,
        "device": "cpu",
        **changes,
    }
    return FitConfig(**fields)


@pytest.fixture(scope="module")
def fitted(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both subjects."""
    run_dir = tmp_path_factory.mktemp("run")
    fit(config(world, run_dir, subj=("01", "02")), LocalRunner())
    return run_dir


def test_a_fit_leaves_its_files(fitted: Path) -> None:
    for subj in ("subj01", "subj02"):
        folder = fitted / subj
        record = json.loads((folder / "run.json").read_text())
        assert record["result"]["epochs"] == 3 and record["n_val"] == 4 and record["n_train"] == 36
        assert record["config"]["encoder"]["d_model"] == 16
        assert "planted" in record["notes"][0]
        assert (folder / "best/model.pt").is_file() and (folder / "split.json").is_file()
    assert (fitted / "report.html").stat().st_size > 50_000
    assert json.loads((fitted / "run.json").read_text())["subjects"] == {
        "01": "subj01",
        "02": "subj02",
    }


def test_scores_are_those_of_a_plain_forward(fitted: Path, world: World) -> None:
    summaries = evaluate(EvaluateConfig(run_dir=fitted, eval_batch=4, device="cpu"))
    for subj in ("01", "02"):
        subject = world.data / f"subj{subj}"
        applied = open_applied(
            EvaluateConfig(run_dir=fitted, device="cpu"), fitted / f"subj{subj}", fmri=True
        )
        images = sorted((subject / "test_split/test_images").iterdir())
        tokens = torch.from_numpy(np.stack([tokens_of(path) for path in images])).float()
        with torch.no_grad():
            predicted = applied.model.eval()(tokens)
        folder = fitted / f"subj{subj}/evaluation/test"
        every = []
        for hemi in ("lh", "rh"):
            true = np.load(subject / f"test_split/test_fmri/{hemi}_test_fmri.npy").astype(float)
            want = [
                r_regression(predicted[hemi][:, [v]].double().numpy(), true[:, v])[0]
                for v in range(V)
            ]
            np.testing.assert_allclose(np.load(folder / f"{hemi}_r.npy"), want, atol=1e-5)
            every += want
        assert summaries[subj]["mean_r"] == pytest.approx(np.mean(every), abs=1e-6)
        nc = np.concatenate(
            [np.load(subject / f"noise_ceiling/{h}_noise_ceiling.npy") for h in ("lh", "rh")]
        ).astype(float)
        used = nc >= 1e-3
        ceiling = np.sqrt(nc[used]).mean()
        assert summaries[subj]["n_explainable"] == used.sum() < 2 * V
        assert summaries[subj]["mean_ceiling_r"] == pytest.approx(ceiling, abs=1e-6)
        reached = np.mean(np.array(every)[used]) / ceiling
        assert summaries[subj]["recovered"] == pytest.approx(reached, abs=1e-5)


def test_the_tables_agree_with_each_other(fitted: Path, world: World) -> None:
    evaluate(EvaluateConfig(run_dir=fitted / "subj01", device="cpu"))
    folder = fitted / "subj01/evaluation/test"
    rois = pq.read_table(folder / "rois.parquet").to_pylist()
    assert {(record["hemi"], record["roi"]) for record in rois} >= {("lh", "V1v"), ("rh", "all")}
    assert len(rois) == 2 * (24 + 7 + 2)
    with (folder / "rois.csv").open() as file:
        assert [row["roi"] for row in csv.DictReader(file)] == [record["roi"] for record in rois]
    masks = np.load(world.data / "subj01/roi_masks/rh.floc-faces_challenge_space.npy")
    r = np.load(folder / "rh_r.npy").astype(float)
    record = next(x for x in rois if x["hemi"] == "rh" and x["roi"] == "FFA-1")
    assert record["n_vertices"] == (masks == 2).sum()
    assert record["median_r"] == pytest.approx(np.median(r[masks == 2]), abs=1e-6)
    vertices = pq.read_table(folder / "vertices.parquet").to_pylist()
    member = [
        v["vertex"] for v in vertices if v["hemi"] == "rh" and "floc-faces/FFA-1" in v["rois"]
    ]
    assert member == np.flatnonzero(masks == 2).tolist()
    assert not list(folder.glob(".*"))


def test_validation_is_scored_on_the_held_out_rows(fitted: Path) -> None:
    summary = evaluate(EvaluateConfig(run_dir=fitted / "subj02", split="val", device="cpu"))["02"]
    record = json.loads((fitted / "subj02/run.json").read_text())
    assert summary["n_images"] == 4
    assert summary["mean_r"] == pytest.approx(record["result"]["best_val_r"], abs=1e-5)


def test_predictions_are_the_submission(fitted: Path, world: World, tmp_path: Path) -> None:
    written = predict(
        PredictConfig(run_dir=fitted, output_dir=tmp_path, eval_batch=4, device="cpu")
    )
    for subj, files in written.items():
        r = np.load(fitted / f"subj{subj}/evaluation/test/lh_r.npy")
        got = np.load(files["lh"])
        assert files["lh"] == tmp_path / f"subj{subj}/lh_pred_test.npy"
        assert got.shape == (PLANTED.n_test, V) and got.dtype == np.float32
        true = np.load(world.data / f"subj{subj}/test_split/test_fmri/lh_test_fmri.npy")
        again = [np.corrcoef(got[:, v], true[:, v])[0, 1] for v in range(V)]
        np.testing.assert_allclose(again, r, atol=1e-4)


def test_predictions_of_withheld_responses_and_unreadable_images(
    world: World, fitted: Path, tmp_path: Path
) -> None:
    changed = world.copy(tmp_path)
    shutil.rmtree(changed.data / "subj01/test_split/test_fmri")
    extract_toy(changed.data, changed.features, bad=(2, 8))
    moved = {"data_dir": changed.data, "features_dir": changed.features, "device": "cpu"}
    cfg = PredictConfig(run_dir=fitted / "subj01", output_dir=tmp_path / "out", **moved)
    got = np.load(predict(cfg)["01"]["rh"])
    assert np.flatnonzero(np.isnan(got).all(1)).tolist() == [2, 8]
    assert np.isfinite(np.delete(got, [2, 8], 0)).all()
    with pytest.raises(MissingInput, match="withholds"):
        evaluate(EvaluateConfig(run_dir=fitted / "subj01", **moved))


def test_unreadable_images_never_enter(world: World, tmp_path: Path) -> None:
    changed = world.copy(tmp_path)
    extract_toy(changed.data, changed.features, bad=(0, 3))
    run_dir = tmp_path / "run"
    fit(config(changed, run_dir), LocalRunner())
    split = json.loads((run_dir / "split.json").read_text())
    assert not {0, 3} & {*split["train_rows"], *split["val_rows"]}
    assert len(split["train_rows"]) + len(split["val_rows"]) == PLANTED.n_train - 2
    assert json.loads((run_dir / "run.json").read_text())["n_invalid"] == 2
    summary = evaluate(EvaluateConfig(run_dir=run_dir, device="cpu"))["01"]
    assert summary["n_images"] == PLANTED.n_test - 2 and summary["n_invalid"] == 2
    assert np.isfinite(summary["mean_r"])


def test_a_run_goes_on_to_the_same_losses(world: World, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(config(world, whole), LocalRunner())
    fit(config(world, parts, train=replace(TRAIN, epochs=1)), LocalRunner())
    fit(config(world, parts), LocalRunner())

    def losses(run_dir: Path) -> list[float]:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line).get("loss") or json.loads(line)["val_loss"] for line in lines]

    assert losses(whole) == losses(parts)


def test_a_finished_fit_is_not_done_again_and_keeps_its_record(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(config(world, tmp_path), LocalRunner())
    before = (tmp_path / "run.json").read_bytes()
    first = json.loads(before)["result"]
    capsys.readouterr()
    (done,) = fit(config(world, tmp_path, train=replace(TRAIN, keep=3)), LocalRunner()).subjects
    assert "subject 01: complete already, 3 epochs" in capsys.readouterr().out
    assert (tmp_path / "run.json").read_bytes() == before
    assert (done.result.epochs, done.result.best_val_loss) == (3, first["best_val_loss"])
    # Killed between the last checkpoint and the record: the result is the checkpoint's.
    (tmp_path / "run.json").write_text(json.dumps({**json.loads(before), "result": None}))
    fit(config(world, tmp_path), LocalRunner())
    mended = json.loads((tmp_path / "run.json").read_text())["result"]
    assert {**mended, "seconds": 0} == {**first, "seconds": 0}
    with pytest.raises(ConfigError, match="3 epochs done, --epochs 2 is fewer"):
        fit(config(world, tmp_path, train=replace(TRAIN, epochs=2)), LocalRunner())
    assert fit(config(world, tmp_path, resume=False), LocalRunner()).subjects[0].result.epochs == 3


def test_every_process_of_a_run_leaves_its_memory_log(world: World, tmp_path: Path) -> None:
    fit(config(world, tmp_path), LocalRunner())
    evaluate(EvaluateConfig(run_dir=tmp_path, device="cpu"))
    predict(PredictConfig(run_dir=tmp_path, device="cpu"))
    logs = {path.stem: read_history(path) for path in (tmp_path / "memory").glob("*.csv")}
    assert set(logs) == {"train", "evaluate", "predict"}
    record = json.loads((tmp_path / "run.json").read_text())["memory"]
    assert record["sources"]["max_memory_per_process_gb"].startswith("auto")
    page = (tmp_path / "report.html").read_text()
    assert "Memory" in page
    unwatched = MemoryFlags(monitor_memory_usage=False)
    shutil.rmtree(tmp_path / "memory")
    evaluate(EvaluateConfig(run_dir=tmp_path, device="cpu", memory=unwatched))
    assert not (tmp_path / "memory").exists()


@pytest.mark.parametrize("job", [evaluate, predict])
def test_scores_do_not_depend_on_a_throttled_batch(
    fitted: Path, tmp_path: Path, job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pressed(InProcessGuard):
        asked = 0

        def pressure(self) -> bool:
            Pressed.asked += 1
            return True

    def results() -> list[np.ndarray]:
        cfg = EvaluateConfig if job is evaluate else PredictConfig
        job(cfg(run_dir=run_dir, device="cpu", eval_batch=8))
        files = (run_dir / "subj01").glob(
            f"{'evaluation' if job is evaluate else 'pred'}*/**/*.npy"
        )
        return [np.load(path) for path in sorted(files)]

    run_dir = tmp_path / "run"
    shutil.copytree(fitted, run_dir)
    plain = results()
    monkeypatch.setattr("raypipe.memory.attend.InProcessGuard", Pressed)
    throttled = results()
    assert Pressed.asked and plain
    for one, other in zip(plain, throttled, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_subjects_without_weights_are_named_before_any_is_scored(
    world: World, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(fitted, run_dir)
    record = json.loads((run_dir / "subj01/run.json").read_text())
    (run_dir / "subj01/run.json").write_text(json.dumps({**record, "result": None}))
    evaluate(EvaluateConfig(run_dir=run_dir, device="cpu"))
    assert "subject 01: its training has not ended" in capsys.readouterr().out
    shutil.rmtree(run_dir / "subj02/best")
    for job, cfg in ((evaluate, EvaluateConfig), (predict, PredictConfig)):
        with pytest.raises(MissingInput, match="subject 02 is not fitted yet"):
            job(cfg(run_dir=run_dir, device="cpu"))
    assert "subject 01," not in capsys.readouterr().out


def test_another_run_in_the_folder_is_refused(world: World, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    fit(config(world, run_dir), LocalRunner())
    wider = ModelConfig(d_model=32, heads=2, ffn=16)
    for changes, said in (
        ({"encoder": wider}, "other encoder"),
        ({"subj": ("02",)}, "other subject"),
        ({"split_seed": 1}, "another way"),
    ):
        with pytest.raises(ConfigError, match=said):
            fit(config(world, run_dir, **changes), LocalRunner())
    with pytest.raises(ConfigError, match="other subjects"):
        fit(config(world, run_dir, subj=("01", "02")), LocalRunner())
    (run_dir / "evaluation").mkdir()
    fit(config(world, run_dir, encoder=wider, split_seed=1, resume=False), LocalRunner())
    assert not (run_dir / "evaluation").exists()  # scores of weights that are gone
    assert json.loads((run_dir / "run.json").read_text())["config"]["encoder"]["d_model"] == 32


def test_a_dry_run_writes_nothing(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(config(world, tmp_path / "run", dry_run=True, subj=()), None)
    said = capsys.readouterr().out
    assert "subject 01: 36 images to train, 4 to validate" in said and "parameters" in said
    assert not (tmp_path / "run").exists()


def test_a_dry_run_foretells_a_step_and_what_fits(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(config(world, tmp_path / "run", dry_run=True), None)
    plain = capsys.readouterr().out
    for row in ("fp32 ", "checkpointing ", "AMP bf16 ", "AMP bf16 + checkpointing "):
        assert f"\n      {row}" in plain
    assert "this model has no 2-D convolutions" in plain and "--fit-gpu" not in plain
    roomy = replace(TRAIN, fit_gpu="1GiB")
    fit(config(world, tmp_path / "run", dry_run=True, train=roomy), None)
    assert "--fit-gpu 1.00 GiB: fp32, micro batches of 8 x 1" in capsys.readouterr().out
    with pytest.raises(MemoryBudgetExceeded, match="of one row need at least"):
        fit(
            config(world, tmp_path / "run", dry_run=True, train=replace(TRAIN, fit_gpu="9KB")), None
        )
    assert not (tmp_path / "run").exists()


def test_a_fit_within_a_budget_keeps_its_choice(world: World, tmp_path: Path) -> None:
    measured = replace(TRAIN, epochs=1, predict_memory=True)
    fit(config(world, tmp_path / "plain", train=measured), LocalRunner())
    small = replace(TRAIN, epochs=1, batch_size=4, accumulate=2, fit_gpu="1GiB")
    fit(config(world, tmp_path / "run", train=small), LocalRunner())
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


def responses_of(world: World, hemi: str) -> Path:
    return world.data / f"subj01/training_split/training_fmri/{hemi}_training_fmri.npy"


def test_changed_responses_are_refused_by_name(world: World, tmp_path: Path) -> None:
    changed, run_dir = world.copy(tmp_path), tmp_path / "run"
    fit(config(changed, run_dir, train=replace(TRAIN, epochs=1)), LocalRunner())
    before = (run_dir / "run.json").read_bytes()
    array = np.load(responses_of(changed, "rh"))
    np.save(responses_of(changed, "rh"), array[::-1].copy())
    with pytest.raises(ConfigError, match=r"run of other rh responses;.*--no-resume"):
        fit(config(changed, run_dir), LocalRunner())
    assert (run_dir / "run.json").read_bytes() == before
    # The checkpoint knows by itself what it was trained on.
    (run_dir / "run.json").unlink()
    with pytest.raises(ConfigError, match="was trained on other rh than"):
        fit(config(changed, run_dir), LocalRunner())
    np.save(responses_of(changed, "rh"), array)
    assert fit(config(changed, run_dir), LocalRunner()).subjects[0].result.epochs == 3


def test_roi_masks_of_the_same_names_are_no_less_compared(world: World, tmp_path: Path) -> None:
    changed, run_dir = world.copy(tmp_path), tmp_path / "run"
    fit(config(changed, run_dir), LocalRunner())
    path = changed.data / "subj01/roi_masks/lh.floc-faces_challenge_space.npy"
    mask = np.load(path)
    np.save(path, np.roll(mask, 1))
    with pytest.raises(ConfigError, match="run of other ROI masks"):
        fit(config(changed, run_dir), LocalRunner())
    with pytest.raises(InputError, match="other ROI masks"):
        evaluate(EvaluateConfig(run_dir=run_dir, device="cpu"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"train": replace(TRAIN, lr=1.0)}, "lr"), ({"split_seed": 1}, "another way")],
)
def test_a_refused_command_leaves_the_record_alone(
    world: World, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    fit(config(world, tmp_path), LocalRunner())
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ConfigError, match=said):
        fit(config(world, tmp_path, **changes), LocalRunner())
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

    fit(config(world, tmp_path), LocalRunner())
    other = {"encoder": ModelConfig(d_model=16, heads=4, ffn=16, dropout=0.0)}
    with pytest.raises(WorkerFailed):
        fit(config(world, tmp_path, resume=False, **other), Within(lost))
    assert not [*tmp_path.glob("last*"), *tmp_path.glob("best*")]


def test_starting_over_that_is_refused_costs_no_weights(world: World, tmp_path: Path) -> None:
    fit(config(world, tmp_path), LocalRunner())
    before = sorted(tmp_path.glob("best*"))
    with pytest.raises(ConfigError, match="--runner ray"):
        fit(config(world, tmp_path, resume=False, workers=2), LocalRunner())
    assert before and sorted(tmp_path.glob("best*")) == before
    (again,) = fit(config(world, tmp_path), LocalRunner()).subjects
    assert again.result.epochs == 3


def test_a_fit_of_all_and_one_of_a_subject_keep_each_other_out(
    world: World, tmp_path: Path
) -> None:
    both = config(world, tmp_path / "run", subj=("01", "02"))
    first = config(world, tmp_path / "run" / "subj01")

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
    cfg = config(world, tmp_path / "run", **wide, train=replace(TRAIN, epochs=2))
    fresh = prepare(cfg, "01", tmp_path / "run")
    needed, generation = fresh.missing_bytes(cfg), 12 * fresh.n_parameters()
    assert needed == fresh.disk_bytes(cfg) == 3 * generation + generation // 3
    fit(cfg, LocalRunner())
    there = on_disk_bytes(tmp_path / "run")
    assert there == pytest.approx(needed - generation, rel=0.1)
    free = int(1.2 * generation)
    monkeypatch.setattr(space, "free_bytes", lambda path: free)
    fit(config(world, tmp_path / "run", **wide), LocalRunner())
    fit(config(world, tmp_path / "run", **wide, resume=False), LocalRunner())
    free = int(0.8 * generation)
    with pytest.raises(NoSpace):
        fit(config(world, tmp_path / "run", **wide, train=replace(TRAIN, epochs=4)), LocalRunner())
    with pytest.raises(NoSpace):
        fit(config(world, tmp_path / "new", **wide), LocalRunner())


def test_a_dry_run_says_what_its_numbers_cover(
    fitted: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(config(world, fitted, dry_run=True, subj=("01", "02")), None)
    lines = capsys.readouterr().out.splitlines()
    assert "3 epochs of 5 steps" in lines[0]
    there = format_bytes(on_disk_bytes(fitted / "subj01"))
    assert "2 generations of checkpoints, one being written, the best weights" in lines[1]
    assert f"{there} of checkpoints are there already. Not in it: logs" in lines[1]
    task = prepare(config(world, fitted), "01", fitted / "subj01").task
    with Gatherer(task.sources(), TRAIN.batch_size, depth=2) as ring:
        batches = sum(t.nbytes for slot in ring._slots for t in slot.tensors.values())
    assert f"{format_bytes(2 * batches)} of the host's for batches" in lines[2]
    assert "weights, gradients and AdamW moments" in lines[2] and "activations" in lines[2]


def test_an_encoder_that_answers_the_same_to_all_scores_zero(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    linear = ModelConfig(model="linear", dropout=0.0)
    fit(config(world, tmp_path, encoder=linear, train=replace(TRAIN, epochs=1)), LocalRunner())
    found = checkpoint.newest(tmp_path, "best")
    assert found is not None
    model = {k: v * 0 if k.endswith("weight") else v for k, v in found.load("model").items()}
    checkpoint.save(tmp_path, "best", {"model": model}, {"progress": found.meta["progress"]})
    summary = evaluate(EvaluateConfig(run_dir=tmp_path, device="cpu"))["01"]
    assert summary["n_scored"] == 0 and summary["mean_r"] is None
    assert summary["recovered"] == summary["mean_r_explainable"] == 0.0
    assert summary["n_counted_zero"] == summary["n_explainable"] > 0
    assert "of which 0% is reached" in capsys.readouterr().out
    folder = tmp_path / "evaluation/test"
    assert str(pq.read_schema(folder / "vertices.parquet").field("r").type) == "double"
    assert str(pq.read_schema(folder / "rois.parquet").field("mean_r").type) == "double"
    assert "undefined and counted as 0" in (tmp_path / "report.html").read_text()


def test_dead_vertices_count_as_zero_against_the_ceiling() -> None:
    r = {"lh": np.array([0.5, np.nan, np.nan]), "rh": np.array([0.3, np.nan, 0.2])}
    nc = {"lh": np.array([0.25, 0.25, np.nan]), "rh": np.array([0.36, 0.16, 0.0])}
    summary = summarise(Scores(n_images=9, r=r, nc=nc))
    assert summary["n_explainable"] == 4 and summary["n_counted_zero"] == 2
    ceilings = 0.5 + 0.5 + 0.6 + 0.4
    assert summary["recovered"] == pytest.approx((0.5 + 0.3) / ceilings)
    assert summary["mean_r_explainable"] == pytest.approx(0.8 / 4)
    assert summary["mean_r"] == pytest.approx(1 / 3) and summary["n_scored"] == 3
    assert summary["median_r_over_ceiling"] == pytest.approx(0.25)  # of 1, 0, 0.5, 0
    unknown = {hemi: np.full(3, np.nan) for hemi in r}
    assert summarise(Scores(n_images=9, r=r, nc=unknown))["recovered"] is None


def test_the_parameters_counted_are_those_trained(fitted: Path) -> None:
    record = json.loads((fitted / "subj01/run.json").read_text())
    assert record["n_parameters"] == record["result"]["n_parameters"]


def test_features_of_another_backbone_are_refused(
    world: World, fitted: Path, tmp_path: Path
) -> None:
    changed = world.copy(tmp_path)
    images = sorted((changed.data / "subj01/test_split/test_images").iterdir())
    rows = np.stack([tokens_of(path) for path in images])
    path = changed.features / FEATURE / "01" / "synt.npy"
    other = {"arch": "toy", "weights": "random:1"}
    write_store(path, rows, [image.name for image in images], identity=other)
    with pytest.raises(InputError, match="other weights"):
        evaluate(
            EvaluateConfig(run_dir=fitted / "subj01", features_dir=changed.features, device="cpu")
        )


def test_other_roi_masks_are_refused(world: World, fitted: Path, tmp_path: Path) -> None:
    changed = world.copy(tmp_path)
    for path in (changed.data / "subj01/roi_masks").glob("*floc-words*"):
        path.unlink()
    cfg = EvaluateConfig(run_dir=fitted / "subj01", data_dir=changed.data, device="cpu")
    with pytest.raises(InputError, match="other ROI masks"):
        evaluate(cfg)


def test_no_run_and_no_checkpoint(world: World, fitted: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="run folder"):
        evaluate(EvaluateConfig(run_dir=tmp_path))
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("run.json", "split.json"):
        shutil.copy(fitted / "subj01" / name, bare / name)
    with pytest.raises(MissingInput):
        evaluate(EvaluateConfig(run_dir=bare, device="cpu"))


def test_without_a_ceiling_and_with_the_linear_encoder(world: World, tmp_path: Path) -> None:
    changed = world.copy(tmp_path)
    shutil.rmtree(changed.data / "subj01/noise_ceiling")
    linear = ModelConfig(model="linear", linear_pool="grid", linear_grid=2)
    run_dir = tmp_path / "run"
    fit(config(changed, run_dir, encoder=linear), LocalRunner())
    summary = evaluate(EvaluateConfig(run_dir=run_dir, checkpoint="last", device="cpu"))["01"]
    assert "recovered" not in summary and summary["epoch"] == 2
    header = (run_dir / "evaluation/test/rois.csv").read_text().splitlines()[0]
    assert "ceiling" not in header


def test_responses_with_a_hole_are_refused_before_training(world: World, tmp_path: Path) -> None:
    changed = world.copy(tmp_path)
    path = changed.data / "subj01/training_split/training_fmri/lh_training_fmri.npy"
    array = np.load(path)
    array[5, 6] = np.nan
    np.save(path, array)
    with pytest.raises(InputError, match="image 5, vertex 6"):
        fit(config(changed, tmp_path / "run"), LocalRunner())
    assert not (tmp_path / "run").exists()


def test_unknown_subject_and_bad_options(world: World, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="nearest"):
        fit(config(world, tmp_path / "run", subj=("09",)), LocalRunner())
    for changes in (
        {"val_fraction": 0.0},
        {"val_fraction": 1.0},
        {"workers": 0},
        {"split_seed": -1},
    ):
        with pytest.raises(ConfigError):
            config(world, tmp_path, **changes)
    with pytest.raises(ConfigError):
        EvaluateConfig(run_dir=tmp_path, eval_batch=0)


def test_a_prediction_that_breaks_off_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lh.npy"
    with pytest.raises(RuntimeError), PredictionFile(path, 3, 4) as file:
        file.write(1, np.ones(4, np.float32))
        raise RuntimeError("broken off")
    assert list(path.parent.iterdir()) == []
    with PredictionFile(path, 2, 4) as file:
        file.write(1, np.full(4, 2, np.float32))
        file.write(0, np.full(4, 1, np.float32))
    np.testing.assert_array_equal(np.load(path), [[1] * 4, [2] * 4])


def test_help_and_planning_load_neither_torch_nor_ray() -> None:
    code = (
        "import sys, raypipe.encoding, raypipe.encoding.config, raypipe.report.commands;"
        "print([m for m in ('torch', 'ray', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
