"""Small subjects for the tests of the loader: scans with autocorrelation and drift, masks, confounds."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
from nifti_kit import AFFINE, write_scan
from scipy.signal import lfilter

from raypipe import MemoryConfig

SHAPE, T, TR = (6, 7, 5), 60, 2.0
#: Whatever else runs on this machine, these small arrays fit.
MEMORY = MemoryConfig(available_memory_buffer=0.0, memmap_threshold_gb=1.0)
MAPPING = MemoryConfig(available_memory_buffer=0.0, memmap_threshold_gb=0.0)


def bold(folder: Path, name: str = "bold.nii.gz", *, seed: int = 0, dtype: str = "<i2") -> Path:
    """A scan of (6, 7, 5, 60): AR(1) noise, a drift, about 1000; int16 with slope and intercept."""
    rng = np.random.default_rng(seed)
    noise = lfilter([1], [1, -0.5], rng.normal(0, 12, (*SHAPE, T)))
    values = 1000 + rng.normal(0, 60, (*SHAPE, 1)) + noise + np.linspace(0, 40, T)
    if np.dtype(dtype).kind == "f":
        return write_scan(folder / name, values.astype(dtype), tr=TR)
    slope, inter = 0.0371, 812.5
    raw = np.round((values - inter) / slope).astype(dtype)
    return write_scan(folder / name, raw, slope=slope, inter=inter, tr=TR)


def mask(seed: int = 5) -> np.ndarray:
    """(6, 7, 5) uint8, about a third of the voxels."""
    return (np.random.default_rng(seed).random(SHAPE) < 0.35).astype(np.uint8)


def mask_image(seed: int = 5) -> nibabel.Nifti1Image:
    """``mask`` on the scans' grid."""
    return nibabel.Nifti1Image(mask(seed), AFFINE)


def confounds(seed: int = 2, k: int = 4) -> np.ndarray:
    """(60, k), slow."""
    rng = np.random.default_rng(seed)
    return lfilter([1], [1, -0.9], rng.normal(size=(T, k)), axis=0)
