"""Training straight from images: the numbers of stored features, up to the store's precision.

One real backbone (ResNet-18's second stage, seeded random weights) on planted photographs: extracted
once into stores, and computed on the fly from the same files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoding_kit import World, pageless
from fly_kit import (
    FEATURE,
    OPTIONS,
    TOLERANCE,
    TRAIN,
    config,
    image,
    losses,
    planted,
    records,
    spoil,
)

from raypipe.backbone.options import FeatureOptions
from raypipe.config import parse
from raypipe.encoding import (
    EvaluateConfig,
    FitConfig,
    ModelConfig,
    PredictConfig,
)
from raypipe.encoding.assess import evaluate, predict
from raypipe.encoding.frozen import FrozenBackbone, release
from raypipe.encoding.prepare import prepare
from raypipe.encoding.run import fit
from raypipe.errors import BadImage, ConfigError, InputError, Interrupted
from raypipe.extract.config import ExtractConfig
from raypipe.extract.run import extract
from raypipe.runner import LocalRunner

pytestmark = pytest.mark.usefixtures("no_page")


@dataclass(frozen=True)
class Fly:
    """Planted data, stores of them with one unreadable image, and a finished run of either kind."""

    world: World
    stored: Path
    flown: Path


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    """No test finds the backbone that another one loaded."""
    yield
    release()


@pytest.fixture(scope="module")
def fly(tmp_path_factory: pytest.TempPathFactory) -> Fly:
    root = tmp_path_factory.mktemp("fly")
    world = planted(root)
    with pageless():
        extract(
            ExtractConfig(data_dir=world.data, output_dir=world.features, device="cpu", **OPTIONS),
            LocalRunner(),
        )
        fit(config(world, root / "stored", stored=True), LocalRunner())
        fit(config(world, root / "flown"), LocalRunner())
    return Fly(world, root / "stored", root / "flown")


def test_the_losses_are_those_of_stored_features(fly: Fly) -> None:
    np.testing.assert_allclose(losses(fly.flown), losses(fly.stored), rtol=TOLERANCE)
    for name in ("val_loss", "val_r", "train_loss"):
        flown, stored = (
            [r[name] for r in records(run, "epoch")] for run in (fly.flown, fly.stored)
        )
        np.testing.assert_allclose(flown, stored, rtol=TOLERANCE, atol=TOLERANCE)
    assert (fly.flown / "split.json").read_bytes() == (fly.stored / "split.json").read_bytes()
    one, other = (json.loads((run / "run.json").read_text()) for run in (fly.flown, fly.stored))
    assert one["features"]["identity"] == other["features"]["identity"]
    assert one["features"]["shape"] == other["features"]["shape"] == [32, 64, 128]
    assert one["features"]["on_the_fly"] and one["n_invalid"] == other["n_invalid"] == 1


def test_the_backbone_is_in_no_checkpoint(fly: Fly) -> None:
    sizes = [(run / "best/model.pt").stat().st_size for run in (fly.flown, fly.stored)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_scores_and_predictions_need_no_store(fly: Fly, tmp_path: Path) -> None:
    by_store, by_images = (
        evaluate(EvaluateConfig(run_dir=run, device="cpu", eval_batch=4))["01"]
        for run in (fly.stored, fly.flown)
    )
    assert by_images["n_images"] == by_store["n_images"] == 7 and by_images["n_invalid"] == 1
    for name in ("mean_r", "recovered"):
        assert by_images[name] == pytest.approx(by_store[name], abs=TOLERANCE)
    r = [np.load(run / "evaluation/test/lh_r.npy") for run in (fly.flown, fly.stored)]
    # A correlation over 7 images follows its predictions; those follow tokens of 11 bits.
    np.testing.assert_allclose(*r, atol=8 * TOLERANCE)
    cfg = PredictConfig(run_dir=fly.flown, output_dir=tmp_path, device="cpu")
    got = np.load(predict(cfg)["01"]["rh"])
    assert np.flatnonzero(np.isnan(got).all(1)).tolist() == [2]
    assert np.isfinite(np.delete(got, 2, 0)).all()


def test_stores_made_later_serve_a_run_made_on_the_fly(fly: Fly) -> None:
    one, other = (
        evaluate(EvaluateConfig(run_dir=fly.flown, split="val", device="cpu", **where))["01"]
        for where in ({}, {"features_dir": fly.world.features})
    )
    assert one["mean_r"] == pytest.approx(other["mean_r"], abs=TOLERANCE)
    assert one["features_fingerprint"] != other["features_fingerprint"]


class Stop(LocalRunner):
    """Asks training to stop once it has done ``steps``."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def fit(self, task: Any, cfg: Any, run_dir: Path, **options: Any) -> Any:
        from raypipe.train import WorkerContext, training_plan
        from raypipe.train import fit as train

        asked = iter(range(self.steps - 1))
        ctx = WorkerContext(
            run_dir=run_dir, should_stop=lambda: next(asked, None) is None, say=lambda text: None
        )
        plan = training_plan(task.train_rows, cfg, 1, run_dir)
        train(task, cfg, ctx, lambda start: plan.slices(0, 1, start))
        raise Interrupted("stopped")


def test_a_run_goes_on_in_the_middle_of_an_epoch(fly: Fly, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        fit(config(fly.world, tmp_path), Stop(2))
    assert len(losses(tmp_path)) < len(losses(fly.flown))
    fit(config(fly.world, tmp_path), LocalRunner())
    np.testing.assert_allclose(losses(tmp_path), losses(fly.flown), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": "random:1"}, "other backbone"),
        ({"store_dtype": "bfloat16"}, "other backbone"),
        ({"enc_layer": 2}, "other backbone"),
    ],
)
def test_another_backbone_does_not_resume(fly: Fly, options: dict[str, Any], said: str) -> None:
    before = (fly.flown / "run.json").read_bytes()
    images = FeatureOptions(**{**OPTIONS, **options})
    with pytest.raises(ConfigError, match=said):
        fit(config(fly.world, fly.flown, images=images), LocalRunner())
    assert (fly.flown / "run.json").read_bytes() == before


def test_other_images_do_not_resume_and_those_elsewhere_do(fly: Fly, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(fly.flown, tmp_path / "run"))
    data = Path(shutil.copytree(fly.world.data, tmp_path / "data"))
    moved = World(data, fly.world.features)
    done = fit(config(moved, run_dir), LocalRunner()).subjects[0].result
    assert done.epochs == 2
    shutil.copyfile(image(moved, 9), image(moved, 8))
    with pytest.raises(ConfigError, match="run of other images"):
        fit(config(moved, run_dir), LocalRunner())
    with pytest.raises(InputError, match="holds other images than the fit"):
        evaluate(EvaluateConfig(run_dir=run_dir, data_dir=data, split="val", device="cpu"))
    (run_dir / "run.json").unlink()  # the checkpoint knows by itself
    with pytest.raises(ConfigError, match="was trained on other pixels"):
        fit(config(moved, run_dir), LocalRunner())


def test_unreadable_images_are_in_no_split_or_stop_the_run(fly: Fly, tmp_path: Path) -> None:
    split = json.loads((fly.flown / "split.json").read_text())
    assert 4 not in split["train_rows"] + split["val_rows"]
    strict = FeatureOptions(**OPTIONS, on_bad_image="fail")
    with pytest.raises(BadImage, match="on-bad-image mark"):
        fit(config(fly.world, tmp_path / "run", images=strict), LocalRunner())


def test_images_that_change_under_a_run_are_named(fly: Fly, tmp_path: Path) -> None:
    data = Path(shutil.copytree(fly.world.data, tmp_path / "data"))
    world = World(data, fly.world.features)
    cfg = config(world, tmp_path / "run", encoder=ModelConfig(model="linear", standardise=False))
    source = prepare(cfg, "01", tmp_path / "run").task.sources()["pixels"]
    rows = np.array([0, 1])
    assert source.open().start(rows)().shape == (2, 64, 64, 3)
    shutil.copyfile(image(world, 9), image(world, 1))
    with pytest.raises(InputError, match="holds other bytes"):
        source.open().start(rows)()
    spoil(image(world, 1))
    with pytest.raises(BadImage, match="could when the run began"):
        source.open().start(rows)()
    with pytest.raises(ConfigError, match="has 32 images"):
        source.open().check(np.array([0, 99]))


def test_tokens_are_rounded_as_a_store_rounds_them(fly: Fly) -> None:
    cfg = config(fly.world, Path("unused"), encoder=ModelConfig(standardise=False))
    task = prepare(cfg, "01", Path("unused")).task
    assert task.backbone is not None
    rows = task.train_rows[:8]
    pixels = torch.from_numpy(task.sources()["pixels"].open().start(rows)())
    stored = np.load(fly.world.features / FEATURE / "01/train.npy")[rows]
    got = task.backbone.tokens(pixels)
    assert got.dtype == torch.float16 and not got.is_inference() and not got.requires_grad
    # At most the neighbouring float16, where a sum fell on the other side of the middle.
    np.testing.assert_allclose(got.numpy(), stored, rtol=2.0**-10, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the encoder's AMP is not the backbone's
        assert torch.equal(task.backbone.tokens(pixels), got)
    wide: FrozenBackbone = replace(task.backbone, dtype="float32")
    assert wide.tokens(pixels).dtype == torch.float32 and not wide.tokens(pixels).is_inference()
    other = replace(task.backbone, weights_sha256="0" * 64)
    with pytest.raises(InputError, match="same --weights FILE"):
        other.tokens(pixels)


def test_a_dry_run_weighs_it_against_a_store(
    fly: Fly, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = replace(TRAIN, predict_memory=True)
    fit(config(fly.world, tmp_path / "run", train=train, dry_run=True), None)
    said = capsys.readouterr().out
    assert "31 images an epoch through it, 62 in 2 epochs; a store takes 32 and 512" in said
    assert "a store is cheaper here: " in said and f"--feature {FEATURE}" in said
    assert "AMP bf16" in said  # the planner's table
    assert not (tmp_path / "run").exists()
    once = replace(TRAIN, predict_memory=False, epochs=1)
    fit(config(fly.world, tmp_path / "run", train=once, dry_run=True), None)
    assert "cheaper" not in capsys.readouterr().out


def test_the_planner_counts_the_frozen_weights(fly: Fly) -> None:
    from raypipe.train.footprint import measure

    found = [
        measure(
            prepare(config(fly.world, Path("unused"), stored=stored), "01", Path("unused")).task,
            TRAIN,
            torch.device("cpu"),
        )
        for stored in (False, True)
    ]
    assert found[0].ran == "a frozen backbone"
    weights = 4 * 11_689_512  # ResNet-18's parameters; its buffers are 38 KB more
    more = found[0].static_bytes - found[1].static_bytes
    assert weights <= more < weights + 100_000
    assert found[0].phases["first"][0].a_row > found[1].phases["first"][0].a_row


@pytest.mark.parametrize(
    "fields",
    [
        {"on_the_fly": False, "images": FeatureOptions()},
        {"features_dir": Path("x"), "feature": "y"},
        {"feature": "y"},
    ],
)
def test_stored_or_on_the_fly_and_not_both(fly: Fly, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--on-the-fly and neither"):
        config(fly.world, Path("run"), **fields)


def test_flags_and_a_file_say_the_same(tmp_path: Path) -> None:
    flags = "--on-the-fly --data-dir d --run-dir r --backbone clip --enc-layer 3 --layers 2"
    asked = parse(FitConfig, [*flags.split(), "--store-dtype", "bfloat16"], prog="encode fit")
    file = tmp_path / "fit.yaml"
    file.write_text(
        "on_the_fly: true\ndata_dir: d\nrun_dir: r\nencoder: {layers: 2}\n"
        "images: {backbone: clip, enc_layer: 3, store_dtype: bfloat16}\n"
    )
    assert asked == parse(FitConfig, ["--config", str(file)], prog="encode fit")
    assert (asked.images.backbone, asked.images.enc_layer, asked.encoder.layers) == ("clip", 3, 2)
    extracting = ["--data-dir", "d", "--output-dir", "o", "--backbone", "clip", "--enc-layer", "3"]
    stored = parse(ExtractConfig, [*extracting, "--store-dtype", "bfloat16"], prog="extract")
    assert stored.spec() == asked.images.spec()


def test_one_layer_at_a_time(fly: Fly) -> None:
    images = FeatureOptions(
        backbone="timm:resnet10t", layer=("layer1", "layer2"), weights="random:0"
    )
    with pytest.raises(ConfigError, match="2 layers"):
        prepare(config(fly.world, Path("unused"), images=images), "01", Path("unused"))
