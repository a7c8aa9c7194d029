"""Fit and evaluate for real, in this process: files, resuming, the choice of epoch, scores, refusals."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from raypipe.cli import main
from raypipe.errors import (
    ConfigError,
    InputError,
    Interrupted,
    MemoryBudgetExceeded,
    MissingInput,
)
from raypipe.pages import report
from raypipe.report.commands import ReportConfig
from raypipe.runner import LocalRunner
from raypipe.segment import apply, assess, run
from raypipe.segment.assess import evaluate
from raypipe.segment.config import (
    InputConfig,
    NetworkConfig,
    SegmentEvaluateConfig,
    SegmentFitConfig,
)
from raypipe.segment.planted import PlantedNucleiConfig, make_planted_nuclei
from raypipe.segment.prepare import prepare
from raypipe.segment.run import fit
from raypipe.segment.saved import load_model
from raypipe.tile import engine, measure
from raypipe.train import TrainConfig, stop
from raypipe.train.limit import BatchLimit

TRAIN = TrainConfig(epochs=3, batch_size=4, lr=3e-3, schedule="constant", clip_norm=1.0)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def nuclei(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cfg = PlantedNucleiConfig(n_train=3, n_val=1, n_test=2, size=70, seed=2)
    return make_planted_nuclei(tmp_path_factory.mktemp("nuclei"), cfg)


def config(nuclei: Path, run_dir: Path, **changes: Any) -> SegmentFitConfig:
    inputs = InputConfig(data=nuclei, crop=32, **changes.pop("inputs", {}))
    fields = {
        "run_dir": run_dir,
        "inputs": inputs,
        "network": NetworkConfig(width=4, depth=3),
        "train": TRAIN,
        "device": "cpu",
        **changes,
    }
    return SegmentFitConfig(**fields)


@pytest.fixture(scope="module")
def fitted(nuclei: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    fit(config(nuclei, run_dir), LocalRunner())
    return run_dir


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of matplotlib a run, for tests that do not look at the page."""
    for module in (run, assess):
        monkeypatch.setattr(module, "write_report", lambda run_dir: run_dir / "report.html")


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in records(run_dir, "step")]


def test_the_best_epoch_is_that_of_the_highest_dice(fitted: Path) -> None:
    epochs = records(fitted, "epoch")
    assert len(epochs) == 3
    best = max(epochs, key=lambda record: record["val_dice"])
    run = json.loads((fitted / "run.json").read_text())
    assert run["result"]["best_epoch"] == best["epoch"]
    assert run["result"]["best_val_dice"] == best["val_dice"]
    module, saved = load_model(fitted)
    assert (saved.epoch, saved.threshold) == (best["epoch"], best["val_threshold"])
    assert not module.training and saved.spec.width == 4 and saved.multiple == 4
    assert load_model(fitted, "last")[1].epoch == 2
    losses_ = losses(fitted)
    assert np.mean(losses_[-3:]) < losses_[0]
    assert (fitted / "report.html").stat().st_size > 20_000


def test_scores_are_those_of_a_plain_forward(fitted: Path, nuclei: Path) -> None:
    summary = evaluate(SegmentEvaluateConfig(run_dir=fitted, device="cpu"))
    assert summary["split"] == "test" and summary["n_pictures"] == 2
    module, saved = load_model(fitted)
    model = json.loads((fitted / "model.json").read_text())
    low, high = model["normalisation"]["low"][0], model["normalisation"]["high"][0]
    train = [tifffile.imread(p) for p in sorted((nuclei / "train/images").iterdir())]
    assert low == np.percentile(np.stack(train), 1, method="lower")
    assert high == np.percentile(np.stack(train), 99.8, method="lower")
    found, truth = [], []
    for number in range(2):
        image = tifffile.imread(nuclei / f"test/images/nuclei_{number:03d}.tif").astype(float)
        x = torch.from_numpy(np.pad((image - low) / (high - low), (0, 2), mode="reflect")).float()
        with torch.no_grad():
            p = torch.sigmoid(module(x[None, None])[0, 0, :70, :70]).numpy()
        found.append((p >= saved.threshold).ravel())
        truth.append(
            tifffile.imread(nuclei / f"test/masks/nuclei_{number:03d}_mask.tif").ravel() > 0
        )
    pairs = list(zip(truth, found, strict=True))
    assert summary["pixels"]["dice"] == pytest.approx(
        f1_score(*map(np.concatenate, zip(*pairs, strict=True))), abs=1e-4
    )
    by_picture = [one["dice"] for one in summary["pictures"]]
    np.testing.assert_allclose(by_picture, [f1_score(*pair) for pair in pairs], atol=1e-4)
    masks = [tifffile.imread(p) for p in (nuclei / "test/masks").iterdir()]
    assert summary["objects"]["n_true"] == sum(int(mask.max()) for mask in masks)
    assert 0 < summary["objects"]["ap_50"] <= 1
    page = report(ReportConfig(run=fitted)).read_text()
    assert "Held-out pictures" in page and "nuclei_001" in page


@pytest.mark.usefixtures("no_page")
def test_data_that_moved_or_changed_are_found_or_refused(
    fitted: Path, nuclei: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(nuclei, tmp_path / "moved"))
    here = evaluate(SegmentEvaluateConfig(run_dir=fitted, split="val", device="cpu"))
    there = evaluate(SegmentEvaluateConfig(run_dir=fitted, split="val", data=moved, device="cpu"))
    assert there["pixels"] == here["pixels"] and here["n_pictures"] == 1
    image = moved / "val/images/nuclei_000.tif"
    tifffile.imwrite(image, tifffile.imread(image) + 1)
    with pytest.raises(InputError, match="changed since the fit"):
        evaluate(SegmentEvaluateConfig(run_dir=fitted, split="val", data=moved, device="cpu"))
    image.unlink()
    with pytest.raises(MissingInput, match="say where the data lie now"):
        evaluate(SegmentEvaluateConfig(run_dir=fitted, split="val", data=moved, device="cpu"))


@pytest.mark.parametrize("height", [66, 2])
def test_a_large_picture_scores_as_a_whole_one(
    fitted: Path, nuclei: Path, monkeypatch: pytest.MonkeyPatch, height: int
) -> None:
    image = tifffile.imread(nuclei / "test/images/nuclei_000.tif")[None, :height]
    module, saved = load_model(fitted)
    whole = apply.logits_of(module, saved, image)
    assert whole.shape == (1, 1, height, 70)
    monkeypatch.setattr(apply, "MOST_WHOLE_PIXELS", 100)
    monkeypatch.setattr(apply, "TILE", 16)
    torch.testing.assert_close(apply.logits_of(module, saved, image), whole, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("no_page")
def test_how_far_the_network_looks_is_measured_once(
    fitted: Path, nuclei: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(SegmentEvaluateConfig(run_dir=fitted, device="cpu"))
    measured: list[int] = []

    def count(model: Any, in_channels: int, dims: int = 2) -> Any:
        measured.append(dims)
        return measure(model, in_channels, dims)

    monkeypatch.setattr(engine, "measure", count)
    monkeypatch.setattr(apply, "MOST_WHOLE_PIXELS", 1000)
    monkeypatch.setattr(apply, "TILE", 48)
    tiled = evaluate(SegmentEvaluateConfig(run_dir=fitted, device="cpu"))
    assert tiled["n_pictures"] == 2 and measured == [2]
    assert tiled["pixels"] == pytest.approx(whole["pixels"], abs=1e-4)


@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 4, 16, 32]))
def test_sides_are_mirrored_as_often_as_it_takes(h: int, w: int, multiple: int) -> None:
    x = torch.arange(float(h * w)).reshape(1, 1, h, w)
    wanted = np.pad(x[0, 0].numpy(), ((0, -h % multiple), (0, -w % multiple)), mode="reflect")
    np.testing.assert_array_equal(apply.padded(x, multiple)[0, 0].numpy(), wanted)


@pytest.mark.usefixtures("no_page")
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(
    fitted: Path, nuclei: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def wished(run_dir: Path) -> bool:
        asked.append(1)
        return len(asked) == 5

    cfg = config(nuclei, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(stop, "stop_wished", wished)
        with pytest.raises(Interrupted, match="stopped after"):
            fit(cfg, LocalRunner())
    done = len(losses(cfg.run_dir))
    per_epoch = len(losses(fitted)) // 3
    assert 0 < done < len(losses(fitted)) and done % per_epoch, "it stopped between two epochs"
    fit(cfg, LocalRunner())
    assert losses(cfg.run_dir) == losses(fitted)
    weights = [load_model(run)[0].state_dict() for run in (cfg.run_dir, fitted)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.usefixtures("no_page")
def test_a_run_out_of_budget_ends_with_3_and_goes_on(
    fitted: Path, nuclei: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    calls: list[int] = []

    def at_boundary(self: BatchLimit) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise MemoryBudgetExceeded("train holds 9 GiB of its budget of 8 GiB")

    flags = [
        *(
            "segment",
            "fit",
            "--data",
            str(nuclei),
            "--run-dir",
            str(tmp_path / "run"),
            "--crop",
            "32",
        ),
        *("--width", "4", "--depth", "3", "--epochs", "3", "--batch-size", "4", "--lr", "3e-3"),
        *("--schedule", "constant", "--device", "cpu", "--runner", "local"),
    ]
    with monkeypatch.context() as patched:
        patched.setattr(BatchLimit, "at_boundary", at_boundary)
        assert main(flags) == 3
    assert "budget of 8 GiB" in capsys.readouterr().err
    assert len(losses(tmp_path / "run")) == 5 and (tmp_path / "run/last/meta.json").is_file()
    assert main(flags) == 0
    assert losses(tmp_path / "run") == losses(fitted)


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize(
    ("ema_decay", "stop_at", "epoch", "tuned"),
    [(None, None, 1, True), (0.9, None, 1, False), (None, 6, 1, False)],
)
def test_a_threshold_belongs_to_the_weights_it_was_tuned_on(
    nuclei: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    ema_decay: float | None, stop_at: int | None, epoch: int, tuned: bool,
) -> None:  # fmt: skip
    """Averaged weights are judged and saved as the best; the last are plain, or went on."""
    asked: list[int] = []

    def wished(run_dir: Path) -> bool:
        asked.append(1)
        return len(asked) == stop_at

    cfg = config(nuclei, tmp_path / "run", train=replace(TRAIN, epochs=2, ema_decay=ema_decay))
    monkeypatch.setattr(stop, "stop_wished", wished)
    with pytest.raises(Interrupted) if stop_at else nullcontext():
        fit(cfg, LocalRunner())
    epochs = records(cfg.run_dir, "epoch")
    assert len(epochs) == (1 if stop_at else 2)
    last, best = (load_model(cfg.run_dir, name)[1] for name in ("last", "best"))
    assert (last.epoch, last.threshold) == (epoch, epochs[-1]["val_threshold"] if tuned else None)
    assert best.epoch is not None and best.threshold == epochs[best.epoch]["val_threshold"]


@pytest.mark.usefixtures("no_page")
def test_other_data_in_the_folder_are_refused(fitted: Path, nuclei: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds a run of other normalisation"):
        fit(config(nuclei, fitted, inputs={"normalise": "minmax"}), LocalRunner())
    with pytest.raises(ConfigError, match="holds a run of other model"):
        fit(config(nuclei, fitted, network=NetworkConfig(width=8, depth=3)), LocalRunner())
    again = fit(config(nuclei, fitted), LocalRunner())
    assert again.result is not None and again.result.epochs == 3, "complete already"


@pytest.mark.usefixtures("no_page")
def test_averaging_and_accumulation_change_no_step(nuclei: Path, tmp_path: Path) -> None:
    """2 x 2 rows see the same crops as 4; batch norm alone tells them apart, so only a little."""
    whole = replace(TRAIN, epochs=1)
    halves = replace(whole, batch_size=2, accumulate=2, channels_last=True, ema_decay=0.9)
    for name, train in (("whole", whole), ("halves", halves)):
        fit(config(nuclei, tmp_path / name, train=train), LocalRunner())
    one, other = (losses(tmp_path / name) for name in ("whole", "halves"))
    assert len(one) == len(other)
    np.testing.assert_allclose(one[0], other[0], rtol=0.05)


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize("target", ["boundary", "classes"])
def test_several_classes(nuclei: Path, tmp_path: Path, target: Any) -> None:
    data = nuclei
    if target == "classes":
        data = make_planted_nuclei(
            tmp_path / "data", PlantedNucleiConfig(n_train=2, n_val=1, n_test=1, size=64)
        )
        for path in data.glob("*/masks/*"):
            mask = tifffile.imread(path)
            tifffile.imwrite(path, np.where(mask > 0, 1 + mask % 2, 0).astype(np.uint8))
    cfg = config(data, tmp_path / "run", inputs={"target": target, "classes": 3},
                 train=replace(TRAIN, epochs=1))  # fmt: skip
    fit(cfg, LocalRunner())
    summary = evaluate(SegmentEvaluateConfig(run_dir=tmp_path / "run", device="cpu"))
    names = ("interior", "boundary") if target == "boundary" else ("class 1", "class 2")
    assert {f"dice_{name}" for name in names} <= summary["pixels"].keys()
    assert bool(summary["objects"]) == (target == "boundary")
    assert load_model(tmp_path / "run")[1].threshold is None


def test_a_dry_run_writes_nothing(
    nuclei: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = replace(TRAIN, predict_memory=False)
    fit(config(nuclei, tmp_path / "run", train=train, dry_run=True), None)
    told = capsys.readouterr().out
    assert "3 pictures to train, 1 to validate, 2 to test" in told and "disk" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--crop", "30"], "crop 30 is no multiple of 4"),
        (["--target", "classes", "--classes", "2"], "classes are 0 to 1"),
        (["--model", "vnet"], "unknown model 'vnet'"),
        (["--gain", "2"], "gain=2.0"),
        (["--data", "/nowhere"], "neither a folder nor a table"),
        (["--schedule", "sometimes"], "schedule"),
    ],
)
def test_bad_input_is_one_line_and_2(
    nuclei: Path, tmp_path: Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", str(nuclei), "--crop", "32", "--depth", "3"]
    for name, value in zip(flags[::2], flags[1::2], strict=True):
        if name in given:
            given[given.index(name) + 1] = value
        else:
            given += [name, value]
    args = ["segment", "fit", "--run-dir", str(tmp_path / "r"), "--runner", "local", *given]
    assert main(args) == 2
    told = capsys.readouterr().err.splitlines()
    said_so = [line for line in told if line.startswith("raypipe: ")]
    assert len(said_so) == 1 and said in said_so[0] and told[-1] == said_so[0]
    assert not (tmp_path / "r").exists()


def test_normalisation_and_digest_see_only_what_is_used(nuclei: Path, tmp_path: Path) -> None:
    ready = prepare(config(nuclei, tmp_path))
    assert ready.task.n_train == 3 * round(70 * 70 / 32**2) and len(ready.task.val_rows) == 9
    assert ready.task.crops.n_rows > 10**9
