"""What an ROI that is only read must not pay for: cleaning that does nothing, masks read twice, imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
from loader_kit import AFFINE, SHAPE, bold, mask
from nilearn.signal import clean as nilearn_clean

from raypipe.fmri.clean import CleanConfig, clean
from raypipe.fmri.loader.places import BrainMasks
from raypipe.read.nifti import open_scan
from raypipe.read.runfiles import RunFiles


def _series(n: int = 70, t: int = 24) -> np.ndarray:
    series = np.random.default_rng(0).normal(500, 20, (n, t)).astype(np.float32)
    series[3, 5], series[4, 0], series[9] = np.nan, np.inf, 7.0
    return series


def test_cleaning_nothing_gives_the_series_and_tells_its_voxels() -> None:
    series = _series()
    found = clean(series, CleanConfig())
    np.testing.assert_array_equal(found.values, series)
    np.testing.assert_array_equal(np.flatnonzero(found.not_finite), [3, 4])
    np.testing.assert_array_equal(np.flatnonzero(found.constant), [9])
    np.testing.assert_array_equal(found.volumes, np.arange(24))


def test_what_is_not_to_be_left_alone_is_not() -> None:
    series = _series()
    assert clean(series, CleanConfig(ensure_finite=True)).values[3, 5] == 0
    kept = clean(series, CleanConfig(), sample_mask=np.arange(1, 24))
    np.testing.assert_array_equal(kept.values, series[:, 1:])
    assert not kept.not_finite[4]  # its infinity is in the volume that is left out
    wide = clean(series[:2].astype(np.int16), CleanConfig())
    assert wide.values.dtype == np.float32


def test_a_series_may_be_cleaned_in_place() -> None:
    series = _series()[10:]
    wanted = nilearn_clean(
        series.T.astype(np.float64), detrend=True, standardize="zscore_sample", filter=False
    ).T
    found = clean(series, CleanConfig(detrend=True, standardize="zscore_sample"), out=series)
    assert np.shares_memory(found.values, series)
    np.testing.assert_allclose(series, wanted, atol=1e-5)


def test_a_brain_mask_that_was_changed_is_read_again(tmp_path: Path) -> None:
    scan = open_scan(bold(tmp_path))
    brains = BrainMasks()
    run = RunFiles(subject="1", bold=scan.path, mask=tmp_path / "mask.nii.gz")
    for seed in (1, 2):
        nibabel.save(nibabel.Nifti1Image(mask(seed), AFFINE), run.mask)
        own = np.flatnonzero(mask(seed))
        first = brains.holding(run, scan, own, resample=False)
        np.testing.assert_array_equal(first, own)
        assert brains.holding(run, scan, own[:3], resample=False) is first  # not read again
    outside = np.setdiff1d(np.arange(mask(2).size), own)[-1:]
    assert brains.holding(run, scan, np.append(own[:3], outside), resample=False) is None


def test_reading_an_roi_imports_no_estimators_tables_or_filters(tmp_path: Path) -> None:
    scan = bold(tmp_path)
    code = (
        "import sys, raypipe, numpy as np\n"
        f"loader = raypipe.MemoryEfficientLoader(cache_dir=r'{tmp_path / 'c'}')\n"
        f"found = loader.extract_roi_timeseries_memmap(r'{scan}', np.arange({np.prod(SHAPE)}))\n"
        "slow = {'sklearn', 'pandas', 'nilearn', 'scipy.signal', 'numba', 'torch', 'matplotlib'}\n"
        "print('@@', found.shape[1], sorted(slow & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"@@ {np.prod(SHAPE)} []" in done.stdout.splitlines()
