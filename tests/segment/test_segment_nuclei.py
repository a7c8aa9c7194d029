"""Real nuclei: trained on crops of one half of a picture, tested on the other; and the demo's own bar."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_curve

from raypipe.demo import DemoConfig, NotRecovered
from raypipe.demo import segment as segment_demo
from raypipe.runner import LocalRunner
from raypipe.segment.assess import evaluate
from raypipe.segment.config import (
    InputConfig,
    NetworkConfig,
    SegmentEvaluateConfig,
    SegmentFitConfig,
)
from raypipe.segment.planted import PlantedNucleiConfig, nuclei
from raypipe.segment.run import fit
from raypipe.train import TrainConfig

HALVES = """image,mask,split,cols
{0}/img2d.tif,{0}/mask2d.tif,train,0:192
{0}/img2d.tif,{0}/mask2d.tif,val,192:256
{0}/img2d.tif,{0}/mask2d.tif,test,256:512
"""


@pytest.mark.slow
def test_the_other_half_of_real_nuclei(real_data: Path, tmp_path: Path) -> None:
    """docs/segment.md has the larger run; this one takes 15 CPU seconds."""
    table = tmp_path / "halves.csv"
    table.write_text(HALVES.format(real_data / "nuclei"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cfg = SegmentFitConfig(
            run_dir=tmp_path / "run",
            inputs=InputConfig(data=table, crop=64, coverage=2),
            network=NetworkConfig(width=8, depth=4),
            train=TrainConfig(epochs=12, batch_size=8, lr=3e-3, schedule="cosine", clip_norm=1.0),
            device="cpu",
        )
        fit(cfg, LocalRunner())
        summary = evaluate(SegmentEvaluateConfig(run_dir=tmp_path / "run", device="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert summary["split"] == "test" and summary["pixels"]["dice"] > 0.85
    assert summary["objects"]["n_true"] > 30 and summary["objects"]["ap_50"] > 0.4


def test_brightness_alone_does_not_pass_the_demo() -> None:
    """The best threshold on the pixels' values, chosen with the truth in hand."""
    pictures = [nuclei(PlantedNucleiConfig(), (2, number)) for number in range(4)]
    truth = np.concatenate([mask.ravel() > 0 for _, mask in pictures])
    values = np.concatenate([counts.ravel() for counts, _ in pictures])
    precision, recall, _ = precision_recall_curve(truth, values)
    dice = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    assert dice.max() < segment_demo.LEAST_DICE - 0.05


def test_a_smaller_demo_finds_its_nuclei(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The demo as it stands, on fewer pictures and by a narrower network: fit, evaluate, its own bar."""
    whole = segment_demo.fit_config

    def smaller(out: Path, cfg: DemoConfig) -> SegmentFitConfig:
        job = whole(out, cfg)
        return replace(
            job,
            inputs=replace(job.inputs, crop=64),
            network=NetworkConfig(width=8, depth=4),
            train=replace(job.train, batch_size=4),
        )

    monkeypatch.setattr(segment_demo, "fit_config", smaller)
    planted = partial(PlantedNucleiConfig, n_train=6, n_val=1, n_test=2, size=128)
    monkeypatch.setattr(segment_demo, "PlantedNucleiConfig", planted)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        segment_demo.demo_segment(DemoConfig(job="segment", out=tmp_path), LocalRunner())
    finally:
        torch.set_num_threads(threads)
    told = capsys.readouterr().out
    assert "on 2 held-out pictures" in told and (tmp_path / "run/report.html").is_file()
    summary = json.loads((tmp_path / "run/evaluation/test/summary.json").read_text())
    assert (
        summary["pixels"]["dice"] >= segment_demo.LEAST_DICE and summary["objects"]["ap_50"] > 0.4
    )
    assert f"Dice {summary['pixels']['dice']:.3f}" in told


def test_a_demo_that_finds_too_little_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_demo, "fit", lambda job, runner: None)

    def poor(cfg: SegmentEvaluateConfig) -> dict[str, Any]:
        return {"pixels": {"dice": 0.5}, "objects": {"ap_50": 0.1}, "n_pictures": 4}

    monkeypatch.setattr(segment_demo, "evaluate", poor)
    with pytest.raises(NotRecovered, match=r"Dice 0\.500, 0\.9 is expected"):
        segment_demo.demo_segment(DemoConfig(job="segment", out=tmp_path), LocalRunner())
    assert len(list((tmp_path / "data").glob("*/images/*.tif"))) == 19
