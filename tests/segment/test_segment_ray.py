"""On Ray: crops made by actors for one worker or two, and the losses are those without Ray."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import ray
from torch import nn

from raypipe.cluster.runner import RayRunner
from raypipe.runner import LocalRunner
from raypipe.segment.config import InputConfig, NetworkConfig, SegmentFitConfig
from raypipe.segment.planted import PlantedNucleiConfig, make_planted_nuclei
from raypipe.segment.prepare import prepare
from raypipe.segment.task import SegmentTask
from raypipe.train import TrainConfig

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session"), pytest.mark.slow]
TRAIN = TrainConfig(epochs=2, batch_size=4, lr=3e-3, schedule="constant", clip_norm=1.0)


@dataclass(frozen=True, eq=False, kw_only=True)
class PlainTask(SegmentTask):
    """Without batch norm, whose statistics are each worker's own: two workers then take equal steps."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1))


def losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for line in lines if (record := json.loads(line))["kind"] == "step"]


def test_two_workers_take_the_steps_of_one(tmp_path: Path) -> None:
    planted = PlantedNucleiConfig(n_train=2, n_val=1, n_test=1, size=64)
    cfg = SegmentFitConfig(
        run_dir=tmp_path,
        inputs=InputConfig(
            data=make_planted_nuclei(tmp_path / "data", planted), crop=32, readers=1
        ),
        network=NetworkConfig(width=4, depth=2),
        train=TRAIN,
    )
    ready = prepare(cfg).task
    plain = PlainTask(
        **{
            name: getattr(ready, name)
            for name in ("crops", "n_train", "spec", "loss_config", "seed")
        }
    )
    LocalRunner().fit(plain, TRAIN, tmp_path / "local", device="cpu")
    alone = losses(tmp_path / "local")
    assert len(alone) == 4
    runner = RayRunner(joined=False, on_event=print)
    two = TrainConfig(**{**vars(TRAIN), "batch_size": 2})
    runner.fit(plain, two, tmp_path / "two", workers=2, device="cpu")
    # Its model's weights come from torch's generator, which the loop seeds alike everywhere.
    np.testing.assert_allclose(losses(tmp_path / "two"), alone, rtol=1e-5)
