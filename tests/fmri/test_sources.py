"""Sources of series give the same values wherever those lie, and stay small when pickled."""

from __future__ import annotations

import pickle
from pathlib import Path

import nibabel
import numpy as np
import pytest

from raypipe.errors import InputError
from raypipe.fmri.clean import CleanConfig, clean
from raypipe.fmri.maps import map_image, write_map
from raypipe.fmri.masks import Grid
from raypipe.fmri.sources import (
    ArraySeries,
    CleanedSeries,
    FileSeries,
    JoinedSeries,
    StoredSeries,
    as_source,
)
from raypipe.read.nifti import open_scan
from raypipe.store.voxels import build

SHAPE = (4, 3, 5, 12)
GRID = Grid(shape=SHAPE[:3], affine=np.diag([2.0, 3.0, 4.0, 1.0]))


def _values(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 9, (60, 12)).astype(np.float32)


def test_an_array_is_read_by_flat_indices() -> None:
    values, voxels = _values()[:20], np.arange(5, 45, 2)
    source = ArraySeries(values, voxels)
    np.testing.assert_array_equal(source.read(np.array([9, 5, 9])), values[[2, 0, 2]])
    assert source.n_volumes == 12
    with pytest.raises(InputError, match="voxel 6 is not among"):
        source.read(np.array([5, 6]))
    with pytest.raises(InputError, match="ascending"):
        ArraySeries(values, voxels[::-1])
    np.testing.assert_array_equal(as_source(values).read(np.array([3])), values[[3]])
    assert as_source(source) is source


def test_a_file_and_the_cache_give_what_the_array_gives(tmp_path: Path) -> None:
    values = _values()
    np.save(tmp_path / "series.npy", values)
    image = nibabel.Nifti1Image(values.reshape(SHAPE), GRID.affine)
    nibabel.save(image, tmp_path / "bold.nii.gz")
    scan = open_scan(tmp_path / "bold.nii.gz")
    mask, wanted = np.arange(10, 60), np.array([40, 11, 59])
    with build(scan, mask, tmp_path / "cache", say=lambda text: None) as store:
        stored = StoredSeries(store=store)
        chosen = StoredSeries(store=store, chosen=mask[::2])
        file = FileSeries(path=tmp_path / "series.npy", voxels=np.arange(60))
        for source in (file, stored, chosen):
            handle = pickle.dumps(source)
            assert len(handle) < 2000
            again = pickle.loads(handle)
            np.testing.assert_array_equal(again.read(wanted), values[wanted])
            assert again.n_volumes == 12
        np.testing.assert_array_equal(stored.voxels, mask)
        np.testing.assert_array_equal(chosen.voxels, mask[::2])


def test_runs_are_joined_on_the_voxels_that_all_have() -> None:
    one, two = _values(1), _values(2)
    joined = JoinedSeries(
        parts=(ArraySeries(one[:50], np.arange(50)), ArraySeries(two[10:], np.arange(10, 60)))
    )
    np.testing.assert_array_equal(joined.voxels, np.arange(10, 50))
    assert joined.n_volumes == 24
    read = joined.read(np.array([30, 12]))
    np.testing.assert_array_equal(read, np.hstack((one[[30, 12]], two[[30, 12]])))
    with pytest.raises(InputError, match="no voxel in common"):
        JoinedSeries(parts=(ArraySeries(one[:5]), ArraySeries(two[:5], np.arange(9, 14))))


def test_a_cleaned_source_cleans_run_by_run_as_it_reads() -> None:
    values = _values()
    runs = np.repeat([3, 7], 6)
    config = CleanConfig(detrend=True, standardize="zscore_sample")
    source = CleanedSeries(source=ArraySeries(values), config=config, runs=runs)
    whole = clean(values, config, runs=runs).values
    np.testing.assert_array_equal(source.read(np.array([8, 2])), whole[[8, 2]])
    with pytest.raises(InputError, match="number runs in order"):
        CleanedSeries(source=ArraySeries(values), config=config, runs=runs[::-1])


@pytest.mark.parametrize("name", ["a.nii.gz", "deep/b.nii"])
def test_a_map_lands_on_the_grid_and_is_missing_elsewhere(tmp_path: Path, name: str) -> None:
    voxels, values = np.array([3, 17, 59]), np.array([1.5, -2.0, 0.25])
    path = write_map(tmp_path / name, values, voxels, GRID)
    image = nibabel.load(path)
    found = np.asarray(image.dataobj)
    np.testing.assert_array_equal(image.affine, GRID.affine)
    np.testing.assert_array_equal(found.ravel()[voxels], values)
    assert np.isnan(np.delete(found.ravel(), voxels)).all()
    assert sorted(one.name for one in path.parent.iterdir() if one.is_file()) == [path.name]
    with pytest.raises(InputError, match="must end in"):
        write_map(tmp_path / "a.img", values, voxels, GRID)
    with pytest.raises(InputError, match="one a voxel"):
        map_image(values[:2], voxels, GRID)
