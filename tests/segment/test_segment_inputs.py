"""A run that goes on reads no file again that did not change, and every one that did."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from raypipe.config import to_dict
from raypipe.errors import ConfigError, StoreCorrupt
from raypipe.report.saved import RUN_FILE
from raypipe.runner import LocalRunner
from raypipe.segment import assess, prepare
from raypipe.segment.assess import evaluate
from raypipe.segment.config import (
    InputConfig,
    NetworkConfig,
    SegmentEvaluateConfig,
    SegmentFitConfig,
)
from raypipe.segment.inputs import INPUTS_FILE
from raypipe.segment.loss import LossConfig, applied
from raypipe.segment.planted import PlantedNucleiConfig, make_planted_nuclei
from raypipe.segment.run import fit
from raypipe.train import TrainConfig

TRAIN = TrainConfig(epochs=1, batch_size=4)


pytestmark = pytest.mark.usefixtures("no_page")


@pytest.fixture
def fitted(tmp_path: Path) -> SegmentFitConfig:
    planted = PlantedNucleiConfig(n_train=3, n_val=1, n_test=1, size=40)
    data = make_planted_nuclei(tmp_path / "data", planted)
    for kind in ("images", "masks"):  # so that the split is a choice
        for path in (data / "val" / kind).iterdir():
            path.rename(data / "train" / kind / path.name.replace("000", "009"))
        (data / "val" / kind).rmdir()
    (data / "val").rmdir()
    cfg = SegmentFitConfig(
        run_dir=tmp_path / "run",
        inputs=InputConfig(data=data, crop=16),
        network=NetworkConfig(width=2, depth=2),
        train=TRAIN,
        device="cpu",
    )
    fit(cfg, LocalRunner())
    return cfg


def forbidden(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a file was read again")


READING = ("open_listed", "_check_masks", "measure", "digest_of")


def test_nothing_is_read_again_when_nothing_changed(
    fitted: SegmentFitConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prepare.prepare(replace(fitted, resume=False))
    for name in READING:
        monkeypatch.setattr(prepare, name, forbidden)
    after = prepare.prepare(fitted)
    assert after.identity() == before.identity()
    assert after.pictures == before.pictures and after.saved == before.saved
    np.testing.assert_array_equal(after.task.crops.corner, before.task.crops.corner)
    again = fit(fitted, LocalRunner())
    assert again.result is not None and again.result.epochs == 1
    longer = fit(replace(fitted, train=replace(TRAIN, epochs=2)), LocalRunner())
    assert longer.result is not None and longer.result.epochs == 2
    with pytest.raises(AssertionError, match="read again"):
        fit(replace(fitted, resume=False), LocalRunner())


def test_what_cannot_start_costs_no_weights(fitted: SegmentFitConfig) -> None:
    before = (fitted.run_dir / "best" / "meta.json").read_bytes()
    with pytest.raises(ConfigError, match="--runner ray"):
        fit(replace(fitted, resume=False, workers=2), LocalRunner())
    assert (fitted.run_dir / "best" / "meta.json").read_bytes() == before


def test_scoring_validation_pictures_reads_no_others(
    fitted: SegmentFitConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assess, "digest_of", forbidden)
    ask = SegmentEvaluateConfig(run_dir=fitted.run_dir, split="val", device="cpu")
    assert evaluate(ask)["n_pictures"] == 1
    path = next((fitted.inputs.data / "train/images").iterdir())
    os.utime(path)
    with pytest.raises(AssertionError, match="read again"):
        evaluate(ask)


def test_a_new_time_alone_is_read_and_found_to_be_the_same(fitted: SegmentFitConfig) -> None:
    path = next((fitted.inputs.data / "train/masks").iterdir())
    kept = (fitted.run_dir / INPUTS_FILE).read_text()
    os.utime(path)
    again = fit(replace(fitted, train=replace(TRAIN, epochs=2)), LocalRunner())
    assert again.result is not None and again.result.epochs == 2
    assert (fitted.run_dir / INPUTS_FILE).read_text() != kept, "the new time is noted"


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_change_behind_the_same_size_and_time_is_seen(
    fitted: SegmentFitConfig, kind: str
) -> None:
    path = next((fitted.inputs.data / "train" / kind).iterdir())
    stat, pixels = path.stat(), tifffile.imread(path)
    pixels[5, 5] += 1
    tifffile.imwrite(path, pixels)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    with pytest.raises(ConfigError, match="holds a run of other images and masks"):
        fit(fitted, LocalRunner())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"val_fraction": 0.5}, "images and masks"),
        ({"low_percentile": 20.0}, "normalisation"),
        ({"target": "boundary"}, "labels"),
    ],
)
def test_another_question_is_asked_of_the_files(
    fitted: SegmentFitConfig, change: dict[str, Any], named: str
) -> None:
    inputs = replace(fitted.inputs, **change)
    with pytest.raises(ConfigError, match=f"holds a run of other .*{named}"):
        fit(replace(fitted, inputs=inputs), LocalRunner())


def test_a_new_file_is_seen(fitted: SegmentFitConfig) -> None:
    for kind in ("images", "masks"):
        folder = fitted.inputs.data / "train" / kind
        path = next(folder.iterdir())
        (folder / path.name.replace("nuclei_0", "nuclei_1")).write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match="images and masks"):
        fit(fitted, LocalRunner())


def test_a_spoilt_record_says_what_to_do(fitted: SegmentFitConfig) -> None:
    (fitted.run_dir / INPUTS_FILE).write_text('{"format"')
    with pytest.raises(StoreCorrupt, match=r"inputs\.json.*remove it"):
        prepare.prepare(fitted)
    (fitted.run_dir / INPUTS_FILE).unlink()
    assert prepare.prepare(fitted).task.n_train > 0


@pytest.mark.parametrize(
    ("ignored", "refused"),
    [
        ({"class_weights": [1.0, 2.0]}, False),
        ({"dice_background": True, "focal_gamma": 3.0}, False),
        ({"positive_weight": 5.0}, True),
        ({"loss": "focal", "focal_gamma": 3.0}, True),
    ],
)
def test_an_earlier_run_with_options_that_did_nothing_goes_on(
    fitted: SegmentFitConfig, ignored: dict[str, Any], refused: bool
) -> None:
    """As it was recorded before such options were refused. --target foreground has one map."""
    path = fitted.run_dir / RUN_FILE
    run = json.loads(path.read_text())
    run["identity"]["loss"] |= ignored
    path.write_text(json.dumps(run))
    longer = replace(fitted, train=replace(TRAIN, epochs=2))
    if refused:
        with pytest.raises(ConfigError, match="holds a run of other loss"):
            fit(longer, LocalRunner())
        return
    assert fit(fitted, LocalRunner()).result is not None, "complete already"
    assert path.read_text() == json.dumps(run)
    again = fit(longer, LocalRunner())
    assert again.result is not None and again.result.epochs == 2


def test_what_a_loss_does_not_use_is_not_compared() -> None:
    plain = to_dict(LossConfig())
    weights = {"positive_weight": 5.0, "class_weights": [1.0, 2.0, 3.0], "dice_background": True}
    kept = {name: weights[name] for name in ("class_weights", "dice_background")}
    assert applied(plain | weights, 3) == plain | kept
    assert applied(plain | weights, 1) == plain | {"positive_weight": 5.0}
