"""A small image cut into tiles by a slow model, and runs of nine tiles without any."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import raypipe
from raypipe.tile.grid import TileGrid
from raypipe.tile.ledger import TileRun, TileWriter
from raypipe.tile.output import OutputSpec


class Slow(nn.Module):
    """The mean of a pixel's neighbours, slowly; counts its windows."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.mean = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        nn.init.constant_(self.mean.weight, 1 / 9)
        self.seconds, self.windows = seconds, 0

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 70:  # not while it is measured
            self.windows += len(x)
            time.sleep(self.seconds)
        return self.mean(x)


def image() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((500, 500)).astype(np.float32)


def run(out: Path, model: nn.Module, **options: object) -> np.ndarray:
    """70 pixels and a halo of 1 to either side: 64 tiles."""
    options = {"halo": 1, "align": 1, **options}
    return raypipe.process_large_image(image(), model, 70, out, **options)


def wanted() -> np.ndarray:
    with torch.inference_mode():
        return Slow()(torch.from_numpy(image())[None, None])[0, 0].numpy()


def write_all(begun: TileRun) -> None:
    """Every tile, of sevens, committed."""
    writer = TileWriter(begun.target, "w")
    for number in range(len(begun.done)):
        box = begun.spec.grid.tile(number).keep
        writer.write(number, np.full((1, *(s.stop - s.start for s in box)), 7))
    writer.commit()
    writer.close()
    begun.accept(range(len(begun.done)))


def opened(out: Path, *, overwrite: bool = False) -> TileRun:
    grid = TileGrid.of((50, 60), (20, 20), (0, 0), (1, 1))
    spec = OutputSpec(
        path=out,
        grid=grid,
        frames=1,
        channels=1,
        dtype="uint8",
        keep_frames=False,
        keep_channels=False,
    )
    made = TileRun(spec, {"model": "a"}, "run")
    made.open(overwrite=overwrite)
    return made
