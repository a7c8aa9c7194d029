"""Small images and the configuration that extracts them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from raypipe.extract import run
from raypipe.extract.config import ExtractConfig

SIDE = 256
N_IMAGES = 48


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 48 PNG images, 256x256."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(7)
    for i in range(N_IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        smooth = coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        smooth.save(folder / f"image-{i:03d}.png", compress_level=1)
    return folder


@pytest.fixture
def config(images: Path, tmp_path: Path) -> Callable[..., ExtractConfig]:
    """Makes a configuration over ``images``; keyword arguments override."""

    def make(**options: object) -> ExtractConfig:
        defaults: dict[str, object] = {
            "data_dir": images,
            "output_dir": tmp_path / "features",
            "backbone": "resnet18",
            "weights": "random:0",
            "batch_size": 4,
            "device": "cpu",
        }
        return ExtractConfig(**{**defaults, **options})  # type: ignore[arg-type]

    return make


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a run's page takes longer than a small run: for tests that do not look at it."""
    monkeypatch.setattr(run, "build_report", lambda run_dir: run_dir / "report.html")
