"""Small subjects for the tests of the loader: scans with autocorrelation and drift, masks, confounds."""

from __future__ import annotations

import warnings
from pathlib import Path

import nibabel
import numpy as np
from nifti_kit import AFFINE, write_scan
from nilearn.maskers import NiftiMasker
from scipy.signal import lfilter

from raypipe import MemoryConfig, MemoryEfficientLoader

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


def open_loader(
    folder: Path, memory: MemoryConfig = MEMORY, data=None, **kw
) -> MemoryEfficientLoader:
    """A silent one whose files are below ``folder``."""
    kw = {
        "cache_dir": folder / "cache",
        "temp_dir": folder / "temp",
        "say": lambda text: None,
        **kw,
    }
    return MemoryEfficientLoader(data, memory, **kw)


def by_nilearn(scan, cleaning, values=None, kept=None) -> np.ndarray:
    """(volumes, voxels) of the mask by NiftiMasker; values : confounds, kept : volumes."""
    given = {name: value for name, value in cleaning.items() if name != "filter"}
    if "filter" in cleaning:
        given["clean_args"] = {"filter": cleaning["filter"]}
    masker = NiftiMasker(mask_image(), t_r=TR, dtype=np.float64, reports=False, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return masker.fit().transform(scan, confounds=values, sample_mask=kept)


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """What is float32 of ours is nilearn's."""
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(theirs).std()))
