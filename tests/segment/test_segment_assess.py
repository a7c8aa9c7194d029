"""Evaluation against plain forwards and scikit-learn, whole and by tiles; data that moved or changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from segment_runs import TRAIN, config
from sklearn.metrics import f1_score

from raypipe.errors import InputError, MemoryBudgetExceeded, MissingInput
from raypipe.pages import report
from raypipe.report.commands import ReportConfig
from raypipe.runner import LocalRunner
from raypipe.segment import apply
from raypipe.segment.assess import evaluate
from raypipe.segment.config import SegmentEvaluateConfig
from raypipe.segment.planted import PlantedNucleiConfig, make_planted_nuclei
from raypipe.segment.run import fit
from raypipe.segment.saved import load_model
from raypipe.tile import measure, plan, worker
from raypipe.tile.precision import exact_float32


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


def test_a_small_picture_is_computed_without_tf32(
    fitted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same rule as tiles, on the network's own device; only a GPU could show the numbers."""
    module, saved = load_model(fitted)
    inside: list[torch.device] = []
    seen: list[list[torch.device]] = []

    @contextmanager
    def exact(device: torch.device) -> Iterator[None]:
        inside.append(device)
        yield
        inside.pop()

    assert apply.exact_float32 is exact_float32 is worker.exact_float32
    monkeypatch.setattr(apply, "exact_float32", exact)
    module.register_forward_pre_hook(lambda *_: seen.append(list(inside)))
    apply.logits_of(module, saved, np.zeros((1, 32, 32), np.uint16))
    assert seen == [[torch.device("cpu")]]


@pytest.mark.parametrize("side", [32, 64])
def test_a_device_that_is_full_ends_with_exit_3(
    fitted: Path, monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    """A picture computed whole, and one whose network is measured first."""
    monkeypatch.setattr(apply, "MOST_WHOLE_PIXELS", 40 * 40)
    module, saved = load_model(fitted)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    module.register_forward_pre_hook(full)
    with pytest.raises(MemoryBudgetExceeded, match=r"CUDA out of memory.*--device cpu") as refused:
        apply.logits_of(module, saved, np.zeros((1, side, side), np.uint16))
    assert refused.value.exit_code == 3


@pytest.mark.usefixtures("no_page")
def test_how_far_the_network_looks_is_measured_once(
    fitted: Path, nuclei: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(SegmentEvaluateConfig(run_dir=fitted, device="cpu"))
    measured: list[int] = []

    def count(model: Any, in_channels: int, dims: int = 2) -> Any:
        measured.append(dims)
        return measure(model, in_channels, dims)

    monkeypatch.setattr(plan, "measure", count)
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
