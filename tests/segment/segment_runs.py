"""A small run on small nuclei, and what it left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raypipe.segment.config import InputConfig, NetworkConfig, SegmentFitConfig
from raypipe.train import TrainConfig

TRAIN = TrainConfig(epochs=3, batch_size=4, lr=3e-3, schedule="constant", clip_norm=1.0)


def config(nuclei: Path, run_dir: Path, **changes: Any) -> SegmentFitConfig:
    """Three epochs of a network of three levels; ``inputs``: fields of `InputConfig`."""
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


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of that kind."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == kind]


def losses(run_dir: Path) -> list[float]:
    """Of every step."""
    return [record["loss"] for record in records(run_dir, "step")]
