"""``raypipe demo --job encoding``: photographs in, brain encoder out, held against a planted truth.

Makes a small Algonauts-layout dataset whose responses are known functions of the images plus known
noise, runs extraction, training and evaluation as a person would, and says what share of the
planted ceiling was recovered. The backbone's weights are random (seeded): this shows that the
machinery works, not what a trained network predicts.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from raypipe.demo.recovered import NotRecovered
from raypipe.encoding.assess import evaluate
from raypipe.encoding.config import EvaluateConfig, FitConfig, ModelConfig
from raypipe.encoding.planted import PlantedConfig, make_planted_dataset
from raypipe.encoding.run import fit
from raypipe.extract.config import ExtractConfig
from raypipe.extract.run import extract
from raypipe.runner import Runner
from raypipe.train import TrainConfig
from raypipe.units import format_seconds

if TYPE_CHECKING:
    from raypipe.demo import DemoConfig

BACKBONE, WEIGHTS = "resnet18", "random:0"
SUBJECTS = ("01", "02")
# What an encoder that read the right part of each image must reach; one that reads the wrong
# images, rows or vertices stays near 0.
LEAST_RECOVERED = 0.7


def demo_encoding(cfg: DemoConfig, runner: Runner) -> None:
    """Run the whole; raises NotRecovered when the planted signal was not found again."""
    started = time.monotonic()
    out = cfg.folder
    _say(f"backbone {BACKBONE} with seeded RANDOM weights ({WEIGHTS}): nothing is downloaded")
    planted = PlantedConfig(
        subjects=SUBJECTS, n_train=cfg.n_train, n_test=cfg.n_test, seed=cfg.seed
    )
    data_dir = make_planted_dataset(out / "data", planted)
    _say(f"data: {data_dir}, subjects {', '.join(SUBJECTS)}, {cfg.n_train} + {cfg.n_test} images")
    extract(extract_config(out), runner)
    fit(fit_config(out, cfg), runner)
    summaries = evaluate(EvaluateConfig(run_dir=out / "run", device="cpu"))
    recovered = [summary["recovered"] for summary in summaries.values()]
    mean_r = fmean(summary["mean_r_explainable"] for summary in summaries.values())
    ceiling = fmean(summary["mean_ceiling_r"] for summary in summaries.values())
    print()
    print(f"features   {out / 'features'}")
    print(f"models     {out / 'run'}")
    print(f"report     {out / 'run' / 'report.html'}")
    print(
        f"recovered  mean r {mean_r:.3f} on {cfg.n_test} held-out images a subject; planted ceiling "
        f"{ceiling:.3f}: {fmean(recovered):.0%} of it, in {format_seconds(time.monotonic() - started)}"
    )
    if min(recovered) < LEAST_RECOVERED:
        raise NotRecovered(
            f"a subject reached {min(recovered):.0%} of the planted ceiling, {LEAST_RECOVERED:.0%} are "
            f"expected; look at {out / 'run' / 'report.html'}, and run in an empty --out"
        )


def extract_config(out: Path) -> ExtractConfig:
    """The demo's extraction."""
    return ExtractConfig(
        data_dir=out / "data",
        output_dir=out / "features",
        backbone=BACKBONE,
        weights=WEIGHTS,
        image_size=224,
        device="cpu",
    )


def fit_config(out: Path, cfg: DemoConfig) -> FitConfig:
    """The demo's training: a narrow transformer encoder."""
    return FitConfig(
        data_dir=out / "data",
        features_dir=out / "features",
        feature="resnet18_layer4",
        run_dir=out / "run",
        device="cpu",
        encoder=ModelConfig(d_model=128, heads=8, ffn=256),
        train=TrainConfig(
            epochs=cfg.epochs,
            batch_size=16,
            lr=1e-3,
            schedule="cosine",
            warmup_steps=10,
            weight_decay=0.05,
            clip_norm=1.0,
            seed=cfg.seed,
        ),
    )


def _say(text: str) -> None:
    print(f"demo: {text}", flush=True)
