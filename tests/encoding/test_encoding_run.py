"""Fit, evaluate and predict for real, in this process: numbers against a forward and scikit-learn,
files that are whole. Runs that go on are test_encoding_resume's, plans test_encoding_plan's.
"""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from encoding_kit import (
    FEATURE,
    PLANTED,
    TRAIN,
    World,
    extract_toy,
    fit_config,
    tokens_of,
    write_store,
)
from sklearn.feature_selection import r_regression

from raypipe.encoding import EvaluateConfig, ModelConfig, PredictConfig
from raypipe.encoding.apply import open_applied
from raypipe.encoding.assess import evaluate, predict
from raypipe.encoding.prepare import prepare
from raypipe.encoding.run import fit
from raypipe.errors import InputError, MissingInput
from raypipe.memory.config import MemoryFlags
from raypipe.memory.guard import InProcessGuard
from raypipe.memory.history import read_history
from raypipe.runner import LocalRunner
from raypipe.stream import Gatherer
from raypipe.train import checkpoint
from raypipe.train.checkpoint import on_disk_bytes
from raypipe.units import format_bytes

V = PLANTED.vertices_per_hemi


@pytest.fixture(scope="module")
def fitted(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both subjects."""
    run_dir = tmp_path_factory.mktemp("run")
    fit(fit_config(world, run_dir, subj=("01", "02")), LocalRunner())
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


@pytest.mark.usefixtures("no_page")
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


@pytest.mark.usefixtures("no_page")
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


@pytest.mark.usefixtures("no_page")
def test_unreadable_images_never_enter(world: World, tmp_path: Path) -> None:
    changed = world.copy(tmp_path)
    extract_toy(changed.data, changed.features, bad=(0, 3))
    run_dir = tmp_path / "run"
    fit(fit_config(changed, run_dir), LocalRunner())
    split = json.loads((run_dir / "split.json").read_text())
    assert not {0, 3} & {*split["train_rows"], *split["val_rows"]}
    assert len(split["train_rows"]) + len(split["val_rows"]) == PLANTED.n_train - 2
    assert json.loads((run_dir / "run.json").read_text())["n_invalid"] == 2
    summary = evaluate(EvaluateConfig(run_dir=run_dir, device="cpu"))["01"]
    assert summary["n_images"] == PLANTED.n_test - 2 and summary["n_invalid"] == 2
    assert np.isfinite(summary["mean_r"])


def test_every_process_of_a_run_leaves_its_memory_log(world: World, tmp_path: Path) -> None:
    fit(fit_config(world, tmp_path), LocalRunner())
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


@pytest.mark.usefixtures("no_page")
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


@pytest.mark.usefixtures("no_page")
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


def test_a_dry_run_says_what_its_numbers_cover(
    fitted: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(fit_config(world, fitted, dry_run=True, subj=("01", "02")), None)
    lines = capsys.readouterr().out.splitlines()
    assert "3 epochs of 5 steps" in lines[0]
    there = format_bytes(on_disk_bytes(fitted / "subj01"))
    assert "2 generations of checkpoints, one being written, the best weights" in lines[1]
    assert f"{there} of checkpoints are there already. Not in it: logs" in lines[1]
    task = prepare(fit_config(world, fitted), "01", fitted / "subj01").task
    with Gatherer(task.sources(), TRAIN.batch_size, depth=2) as ring:
        batches = sum(t.nbytes for slot in ring._slots for t in slot.tensors.values())
    assert f"{format_bytes(2 * batches)} of the host's for batches" in lines[2]
    assert "weights, gradients and AdamW moments" in lines[2] and "activations" in lines[2]


def test_an_encoder_that_answers_the_same_to_all_scores_zero(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    linear = ModelConfig(model="linear", dropout=0.0)
    fit(fit_config(world, tmp_path, encoder=linear, train=replace(TRAIN, epochs=1)), LocalRunner())
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


def test_weights_that_went_on_are_of_the_epoch_they_were_trained_in(
    fitted: Path, tmp_path: Path
) -> None:
    """Validated in epoch 1, trained through epoch 2, and no memory for its validation."""
    run_dir = tmp_path / "subj01"
    shutil.copytree(fitted / "subj01", run_dir)
    path = run_dir / "last/meta.json"
    meta = json.loads(path.read_text())
    meta["progress"]["history"].pop()
    meta["progress"]["owes_validation"] = True
    path.write_text(json.dumps(meta))
    cfg = EvaluateConfig(run_dir=run_dir, checkpoint="last", device="cpu")
    assert open_applied(cfg, run_dir, fmri=True).epoch == 2


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
    fit(fit_config(changed, run_dir, encoder=linear), LocalRunner())
    summary = evaluate(EvaluateConfig(run_dir=run_dir, checkpoint="last", device="cpu"))["01"]
    assert "recovered" not in summary and summary["epoch"] == 2
    header = (run_dir / "evaluation/test/rois.csv").read_text().splitlines()[0]
    assert "ceiling" not in header
