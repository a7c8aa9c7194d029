"""Small scans, masks and caches; processes that build; and what a cache folder holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from nifti_kit import raw_values, write_scan

from raypipe.read.nifti import Scan, open_scan

ROOT = Path(__file__).parents[3]


def quiet(text: str) -> None:
    """For ``say``."""


def a_scan(folder: Path, name: str = "bold.nii.gz", *, shape=(5, 6, 7, 9), seed=0, **kw) -> Scan:
    """An int16 scan with a slope, unless told otherwise."""
    dtype = kw.pop("dtype", "<i2")
    kw = {"slope": 0.0371, "inter": 812.5, **kw}
    return open_scan(write_scan(folder / name, raw_values(shape, dtype, seed), **kw))


def a_mask(shape=(5, 6, 7), seed=1) -> np.ndarray:
    """(x, y, z) bool, about half of the voxels."""
    return np.random.default_rng(seed).random(shape[:3]) < 0.5


def entries(cache: Path) -> list[str]:
    """Keys of whole entries."""
    return sorted(path.parent.name for path in cache.glob("*/manifest.json"))


def litter(cache: Path) -> list[str]:
    """What is neither a whole entry, its lock, nor the lock for making room."""
    keep = {"room.lock", *entries(cache), *(f"{key}.lock" for key in entries(cache))}
    return sorted(path.name for path in cache.iterdir() if path.name not in keep)


def start(code: str, *args: object) -> subprocess.Popen[str]:
    """A Python process running ``code`` with the kits importable; its stdin and stdout are pipes."""
    kits = [ROOT, Path(__file__).parent, ROOT / "tests" / "read" / "nifti"]
    env = dict(os.environ, PYTHONPATH=":".join(map(str, kits)), PYTHONUNBUFFERED="1")
    argv = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
