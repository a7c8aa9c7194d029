"""Tiles on real Ray: workers share them, and those of a killed one go to others."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch
from real_kills import killing
from tifffile import imread
from tile_runs import image
from torch import Tensor, nn

from raypipe.cluster.runner import RayRunner
from raypipe.runner import LocalRunner
from raypipe.tile.config import TileConfig
from raypipe.tile.engine import carry_out, infer
from raypipe.tile.ledger import paths_of
from raypipe.tile.plan import TilePlan, make_plan
from raypipe.tile.source import open_source

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


class Napping(nn.Module):
    """A convolution that takes its time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.seconds = nn.Conv2d(1, 1, 3, padding=1), seconds

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds if x.shape[-1] == x.shape[-2] else 0)
        return self.conv(x)


def plan(given: Path, out: Path, nap_s: float) -> TilePlan:
    """49 tiles."""
    cfg = TileConfig(chunk_size=70, workers=2, device="cpu", halo=1, align=1)
    return make_plan(open_source(given, 2), Napping(nap_s), out, cfg, keep_frames=False)


def writers(out: Path) -> list[int]:
    """Workers that have recorded a tile."""
    found = paths_of(out).journal.glob("*.jsonl")
    return [int(p.name.split("-")[1]) for p in found if b'"tile"' in p.read_bytes()]


def test_a_killed_workers_tiles_go_to_others(tmp_path: Path) -> None:
    np.save(tmp_path / "in.npy", np.random.default_rng(0).random((500, 500), np.float32))
    whole, out = tmp_path / "whole.tif", tmp_path / "out.tif"
    local = LocalRunner()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    carry_out(plan(tmp_path / "in.npy", whole, 0), local, local.needs(1, "cpu"))
    torch.set_num_threads(before)

    def whom(found: list[int]) -> int:
        assert "PooledWorker" in psutil.Process(found[0]).cmdline()[0]
        return found[0]

    events: list[str] = []
    runner = RayRunner(joined=False, on_event=events.append)
    needs = runner.needs(2, "cpu")
    # One thread each, as there: the same sums.
    needs = replace(needs, cpus=min(1.0, needs.cpus), run_dir=tmp_path / "run")
    with killing(lambda: writers(out), whom) as killed:
        found = carry_out(plan(tmp_path / "in.npy", out, 0.05), runner, needs)
    assert found.kept == 0 and any(f"worker {killed.pid} failed" in text for text in events)
    assert out.read_bytes() == whole.read_bytes()
    logs = sorted(path.name for path in (tmp_path / "run" / "memory").glob("*.csv"))
    assert logs[0] == "driver.csv" and any(str(killed.pid) in name for name in logs)


def test_workers_share_the_tiles(tmp_path: Path) -> None:
    path = tmp_path / "in.npy"
    np.save(path, image())
    model = nn.Conv2d(1, 1, 3, padding=1)
    cfg = TileConfig(chunk_size=70, workers=2, device="cpu", halo=1, align=1)
    found = infer(
        open_source(path, 2),
        model,
        tmp_path / "out.tif",
        cfg,
        RayRunner(joined=False, on_event=print),
        keep_frames=False,
    )
    with torch.inference_mode():
        whole = model(torch.from_numpy(image())[None, None])[0, 0].numpy()
    assert found.tiles == 49 and found.shape == (500, 500)  # 80 pixels: TIFF wants multiples of 16
    np.testing.assert_allclose(imread(found.path), whole, rtol=0, atol=1e-6)
