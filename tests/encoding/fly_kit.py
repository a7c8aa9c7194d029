"""Training straight from planted photographs, one of them unreadable: small enough for seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from encoding_kit import World

from raypipe.backbone.options import FeatureOptions
from raypipe.encoding import (
    FitConfig,
    ModelConfig,
    PlantedConfig,
    make_planted_dataset,
)
from raypipe.train import TrainConfig

OPTIONS: dict[str, Any] = {"backbone": "resnet18", "enc_layer": 1, "weights": "random:0"}
OPTIONS |= {"image_size": 64, "decode_threads": 2}
FEATURE = "resnet18_layer2"
TRAIN = TrainConfig(epochs=2, batch_size=8, lr=3e-3, schedule="constant", clip_norm=1.0)
# A token is rounded to float16, within 2**-11 of itself. Another batch shape moves float32 sums by
# about 1e-6 of themselves, which only seldom rounds to the neighbouring float16; so losses agree
# far better than 2**-11, but that is what a store's precision promises.
TOLERANCE = 2.0**-11


def config(world: World, run_dir: Path, *, stored: bool = False, **changes: Any) -> FitConfig:
    fields: dict[str, Any] = {
        "data_dir": world.data,
        "run_dir": run_dir,
        "subj": ("01",),
        "encoder": ModelConfig(d_model=16, heads=2, ffn=16, dropout=0.1),
        "train": TRAIN,
        "device": "cpu",
    }
    if stored:
        fields |= {"features_dir": world.features, "feature": FEATURE}
    else:
        fields |= {"on_the_fly": True, "images": FeatureOptions(**OPTIONS)}
    return FitConfig(**{**fields, **changes})


def image(world: World, row: int, split: str = "training") -> Path:
    return sorted((world.data / f"subj01/{split}_split/{split}_images").iterdir())[row]


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in records(run_dir, "step")]


def planted(root: Path) -> World:
    """32 images to train and 8 to test, one unreadable in each; its ``features`` are yet to be made."""
    make_planted_dataset(
        root / "data",
        PlantedConfig(subjects=("01",), n_train=32, n_test=8, vertices_per_hemi=70, seed=5),
    )
    world = World(root / "data", root / "features")
    spoil(image(world, 4))
    spoil(image(world, 2, "test"))
    return world
