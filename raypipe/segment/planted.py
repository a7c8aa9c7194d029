"""Synthetic nuclei: pictures whose instances are known, for the demo and the tests.

Ellipses of random size, place and brightness, some overlapping (the later one hides the earlier), with
smooth texture, under uneven light, out of focus by a Gaussian, with shot and read noise, as 16-bit
counts. What is planted is written beside them: instance masks of the visible part of each nucleus.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from scipy import ndimage

from raypipe.errors import ConfigError
from raypipe.report.saved import write_json

PLANTED_FILE = "planted.json"


@dataclass(frozen=True, kw_only=True)
class PlantedNucleiConfig:
    """What is made. Raises ConfigError when a value breaks its rule."""

    n_train: int = 12
    n_val: int = 3
    n_test: int = 4
    size: int = 192
    """Pixels a side."""
    density: float = 9.0
    """Nuclei for each 100 x 100 pixels, before overlap."""
    radius_px: tuple[float, float] = (6.0, 13.0)
    """Smallest and largest half axis."""
    background: float = 800.0
    """Counts without a nucleus, before uneven light."""
    signal: float = 250.0
    """Counts that a nucleus of middle brightness adds."""
    blur_px: float = 1.0
    """Standard deviation of the point spread."""
    read_noise: float = 12.0
    """Standard deviation of the camera's noise, counts."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("n_train", "n_val", "n_test", "size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"planted {name}={getattr(self, name)}: give at least 1")
        if not 1 <= self.radius_px[0] <= self.radius_px[1] < self.size / 2:
            raise ConfigError(f"planted radius_px={self.radius_px}: give 1 <= smallest <= largest")


def nuclei(cfg: PlantedNucleiConfig, key: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(size, size) uint16 counts and uint16 instances, 0 background: of ``cfg.seed`` and ``key``."""
    rng = np.random.default_rng([cfg.seed, *key])
    n = cfg.size
    y, x = np.mgrid[:n, :n].astype(np.float32)
    light, masks = np.zeros((n, n), np.float32), np.zeros((n, n), np.uint16)
    for number in range(1, 1 + max(1, round(cfg.density * n * n / 1e4))):
        inside = _ellipse(rng, cfg, y, x)
        light[inside] = cfg.signal * rng.uniform(0.5, 1.5)
        masks[inside] = number
    texture = ndimage.gaussian_filter(rng.standard_normal((n, n), np.float32), 2.0)
    light *= 1 + 0.15 * texture / texture.std()
    light = ndimage.gaussian_filter(light + cfg.background, cfg.blur_px) * _uneven(rng, n, y, x)
    counts = rng.poisson(np.maximum(light, 0)) + rng.normal(0, cfg.read_noise, (n, n))
    return np.clip(counts, 0, 65535).astype(np.uint16), _renumbered(masks)


def _ellipse(
    rng: np.random.Generator, cfg: PlantedNucleiConfig, y: np.ndarray, x: np.ndarray
) -> np.ndarray:
    """(n, n) bool: one nucleus, perhaps cut by the picture's edge."""
    row, col = rng.uniform(0, cfg.size, 2)
    a, b = rng.uniform(*cfg.radius_px, 2)
    angle = rng.uniform(0, np.pi)
    u = (y - row) * np.cos(angle) + (x - col) * np.sin(angle)
    v = (x - col) * np.cos(angle) - (y - row) * np.sin(angle)
    return (u / a) ** 2 + (v / b) ** 2 <= 1


def _uneven(rng: np.random.Generator, n: int, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """(n, n): a bright spot somewhere and half as much light far from it."""
    row, col = rng.uniform(0.2 * n, 0.8 * n, 2)
    return np.asarray(0.5 + 0.5 * np.exp(-((y - row) ** 2 + (x - col) ** 2) / (0.9 * n) ** 2))


def _renumbered(masks: np.ndarray) -> np.ndarray:
    """1..k without gaps: a nucleus that is hidden whole is none."""
    return np.unique(masks, return_inverse=True)[1].reshape(masks.shape).astype(np.uint16)


def make_planted_nuclei(folder: Path, cfg: PlantedNucleiConfig) -> Path:
    """Write {train,val,test}/{images,masks}; what is there already is written again, the same."""
    for place, split in enumerate(("train", "val", "test")):
        for number in range(getattr(cfg, f"n_{split}")):
            image, masks = nuclei(cfg, (place, number))
            for kind, pixels, end in (("images", image, ""), ("masks", masks, "_mask")):
                path = folder / split / kind / f"nuclei_{number:03d}{end}.tif"
                path.parent.mkdir(parents=True, exist_ok=True)
                tifffile.imwrite(path, pixels)
    fields = {name: getattr(cfg, name) for name in cfg.__dataclass_fields__}
    write_json(folder / PLANTED_FILE, fields)
    return folder
