"""Masks, atlases and spheres against nilearn and plain loops; other grids, empty masks refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nilearn.image import resample_to_img
from nilearn.masking import apply_mask

from raypipe.errors import InputError, MissingInput, UnknownName
from raypipe.fmri.masks import Grid, atlas_voxels, label_names, mask_voxels, sphere_voxels

SHAPE = (7, 6, 5)
AFFINE = np.array([[-3.0, 0, 0, 20], [0, 3, 0, -15], [0, 0.2, 3.5, 4], [0, 0, 0, 1]])
GRID = Grid(shape=SHAPE, affine=AFFINE)


def _save(path: Path, values: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


def _blob(seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random(SHAPE) > 0.6).astype(np.uint8)


def test_a_mask_lists_voxels_in_nilearns_order(tmp_path: Path) -> None:
    mask = _blob()
    scan = np.random.default_rng(1).normal(size=(*SHAPE, 3)).astype(np.float32)
    path = _save(tmp_path / "mask.nii.gz", mask)
    voxels = mask_voxels(path, GRID)
    assert voxels.dtype == np.int64
    image = nibabel.Nifti1Image(scan, AFFINE)
    np.testing.assert_array_equal(
        scan.reshape(-1, 3)[voxels].T, apply_mask(image, nibabel.load(path))
    )
    np.testing.assert_array_equal(mask_voxels(path, Grid.of(image)), voxels)


def test_a_mask_may_be_4d_with_one_volume_and_hold_nan(tmp_path: Path) -> None:
    values = _blob().astype(np.float32)
    values[0, 0, 0] = np.nan
    path = _save(tmp_path / "mask.nii", values[..., np.newaxis])
    np.testing.assert_array_equal(
        mask_voxels(path, GRID), np.flatnonzero(np.nan_to_num(values).ravel())
    )
    two = _save(tmp_path / "two.nii", np.zeros((*SHAPE, 2), np.uint8))
    with pytest.raises(InputError, match="must be one volume"):
        mask_voxels(two, GRID)


@pytest.mark.parametrize("shift_mm", [0.05, 1.5, 3.0])
def test_a_shifted_affine_is_refused_unless_resampled(tmp_path: Path, shift_mm: float) -> None:
    affine = AFFINE.copy()
    affine[0, 3] += shift_mm
    path = _save(tmp_path / "mask.nii.gz", _blob(), affine)
    with pytest.raises(InputError, match="voxels away from the scan's grid; give resample"):
        mask_voxels(path, GRID)
    reference = nibabel.Nifti1Image(np.zeros(SHAPE, np.uint8), AFFINE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = resample_to_img(nibabel.load(path), reference, interpolation="nearest")
    expected = np.flatnonzero(np.asarray(theirs.dataobj).ravel())
    np.testing.assert_array_equal(mask_voxels(path, GRID, resample=True), expected)


def test_rounding_of_a_header_is_no_shift_but_other_shapes_are(tmp_path: Path) -> None:
    path = _save(tmp_path / "mask.nii.gz", _blob(), AFFINE.astype(np.float32).astype(float) + 1e-6)
    assert mask_voxels(path, GRID).size
    small = _save(tmp_path / "small.nii.gz", _blob()[:-1])
    with pytest.raises(InputError, match=r"has \(6, 6, 5\) voxels, the scan \(7, 6, 5\)"):
        mask_voxels(small, GRID)


def test_an_empty_mask_and_a_missing_file_are_told(tmp_path: Path) -> None:
    path = _save(tmp_path / "none.nii.gz", np.zeros(SHAPE, np.uint8))
    with pytest.raises(InputError, match=r"mask .*none\.nii\.gz holds no voxel"):
        mask_voxels(path, GRID)
    with pytest.raises(MissingInput, match="does not exist"):
        mask_voxels(tmp_path / "absent.nii", GRID)
    (tmp_path / "text.nii").write_text("not an image")
    with pytest.raises(InputError, match="not a readable NIfTI"):
        mask_voxels(tmp_path / "text.nii", GRID)


def test_atlas_labels_by_number_and_name(tmp_path: Path) -> None:
    labels = np.random.default_rng(3).integers(0, 5, SHAPE).astype(np.int16)
    labels[labels == 3] = 0
    path = _save(tmp_path / "atlas.nii.gz", labels)
    every = atlas_voxels(path, GRID)
    assert list(every) == ["1", "2", "4"]
    for label, voxels in every.items():
        np.testing.assert_array_equal(voxels, np.flatnonzero(labels.ravel() == int(label)))
    table = tmp_path / "atlas.tsv"
    table.write_text("index\tname\n1\tV1\n2\tFFA\n3\tgone\n")
    names = label_names(table)
    assert list(atlas_voxels(path, GRID, names=names)) == ["V1", "FFA", "4"]
    chosen = atlas_voxels(path, GRID, ["FFA", 4], names=names)
    assert list(chosen) == ["FFA", "4"]
    np.testing.assert_array_equal(chosen["FFA"], np.flatnonzero(labels.ravel() == 2))
    with pytest.raises(UnknownName, match="unknown atlas label 'FFB'; nearest: FFA"):
        atlas_voxels(path, GRID, ["FFB"], names=names)
    with pytest.raises(UnknownName, match="unknown atlas label '9'"):
        atlas_voxels(path, GRID, [9])
    with pytest.raises(InputError, match="label gone has no voxel"):
        atlas_voxels(path, GRID, ["gone"], names=names)
    table.write_text("number\tname\n1\tV1\n")
    with pytest.raises(InputError, match="not columns index"):
        label_names(table)


def test_an_atlas_of_fractions_is_refused(tmp_path: Path) -> None:
    path = _save(tmp_path / "atlas.nii.gz", np.full(SHAPE, 0.5, np.float32))
    with pytest.raises(InputError, match=r"holds 0\.5, not whole-number labels"):
        atlas_voxels(path, GRID)


@given(
    centre=st.tuples(st.floats(-5, 25), st.floats(-20, 5), st.floats(0, 25)),
    radius_mm=st.floats(0.5, 12),
)
def test_a_sphere_holds_the_voxels_a_plain_loop_finds(
    centre: tuple[float, float, float], radius_mm: float
) -> None:
    expected = []
    for flat, ijk in enumerate(np.ndindex(*SHAPE)):
        mm = AFFINE[:3, :3] @ np.array(ijk) + AFFINE[:3, 3]
        if np.linalg.norm(mm - centre) <= radius_mm:
            expected.append(flat)
    if not expected:
        with pytest.raises(InputError, match="no voxel centre lies within"):
            sphere_voxels(centre, radius_mm, GRID)
        return
    np.testing.assert_array_equal(sphere_voxels(centre, radius_mm, GRID), expected)


def test_several_spheres_are_one_region() -> None:
    centres = (AFFINE @ np.array([[1, 1, 1, 1], [5, 4, 3, 1]]).T)[:3].T
    both = sphere_voxels(centres, 4.0, GRID)
    each = [sphere_voxels(centre, 4.0, GRID) for centre in centres]
    np.testing.assert_array_equal(both, np.union1d(*each))
    with pytest.raises(InputError, match="radius 0 mm"):
        sphere_voxels(centres, 0, GRID)
    with pytest.raises(InputError, match=r"centres have shape \(1, 2\)"):
        sphere_voxels((1.0, 2.0), 3, GRID)
