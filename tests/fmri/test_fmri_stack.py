"""Maps of many subjects: the same group maps whatever the block, in memory that subjects do not add to."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from scipy import stats

from raypipe.errors import NoSpace
from raypipe.fmri.group import sign_flip
from raypipe.fmri.maps import map_image
from raypipe.fmri.masks import Grid
from raypipe.fmri.searchlight import stack as stack_module
from raypipe.fmri.searchlight.settle import save_map
from raypipe.fmri.searchlight.stack import stacked
from raypipe.fmri.searchlight.together import group_maps

# Left to right runs against the index, and slices are tilted.
AFFINE = np.array([[-2.0, 0, 0, 30], [0, 2.5, 0.3, -20], [0, -0.3, 3, 5], [0, 0, 0, 1]])


def _subjects(run_dir: Path, n: int, shape: tuple[int, ...], seed: int = 0) -> list[dict[str, Any]]:
    """Records and maps of ``n`` subjects: scores around 0.6; a tenth of the voxels, and one more each,
    have none."""
    grid, size, records = Grid(shape=shape, affine=AFFINE), int(np.prod(shape)), []
    shared = np.random.default_rng(seed).choice(size, size - size // 10, replace=False)
    for number in range(n):
        rng = np.random.default_rng([seed, number])
        voxels = np.sort(np.delete(shared, number % size)).astype(np.int64)
        name = f"sub-{number:03d}_roi-V1_target-all"
        values = rng.normal(0.6, 0.1, voxels.size)
        (run_dir / "maps").mkdir(parents=True, exist_ok=True)
        image = map_image(
            values, voxels, grid, outside=float("nan")
        )  # save_map would wait for the disk
        nibabel.save(image, run_dir / "maps" / f"{name}_accuracy_searchlight.nii.gz")
        records.append(
            {"unit": name, "subject": f"{number}", "roi": "V1", "target": "all", "space": "MNI"}
            | {"scores": {"accuracy": float(values.max())}, "chance": {"accuracy": 0.5}}
        )
    return records


def _files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "maps").glob("sub-*_searchlight.nii.gz"))


def _group(run_dir: Path, kind: str) -> np.ndarray:
    image = nibabel.load(run_dir / "maps" / f"group_roi-V1_target-all_accuracy_{kind}.nii.gz")
    return np.asarray(image.dataobj, np.float64).ravel()


@pytest.mark.parametrize("block_bytes", [1, 4096, 1 << 20])
def test_blocks_hold_every_centre_of_all_subjects_once(tmp_path: Path, block_bytes: int) -> None:
    _subjects(tmp_path, 5, (6, 5, 4))
    values = np.stack([np.asarray(nibabel.load(f).dataobj).ravel() for f in _files(tmp_path)])
    inside = np.flatnonzero(np.isfinite(values).all(axis=0))
    chances = [0.5, 0.4, 0.3, 0.2, 0.1]
    with stacked(_files(tmp_path), chances, scratch=tmp_path, block_bytes=block_bytes) as stack:
        np.testing.assert_array_equal(stack.centres, inside)
        blocks = list(stack.blocks())
    assert len(blocks) == {1: inside.size, 4096: -(-inside.size // 25), 1 << 20: 1}[block_bytes]
    wanted = values[:, inside].astype(np.float64) - np.array(chances)[:, np.newaxis]
    np.testing.assert_allclose(np.concatenate(blocks, axis=1), wanted, rtol=1e-12)
    assert {path.name for path in tmp_path.iterdir()} == {"maps"}, "the file has no name"


def test_group_maps_in_blocks_are_those_of_all_places_at_once(tmp_path: Path) -> None:
    """Fourteen subjects: signs are drawn, and must be the same in each block."""
    records = _subjects(tmp_path, 14, (6, 5, 4))
    row = group_maps(tmp_path, records, seed=3, block_bytes=14 * 4 * 8 * 7)[0]  # seven centres
    values = np.stack([np.asarray(nibabel.load(f).dataobj).ravel() for f in _files(tmp_path)])
    inside = np.isfinite(values).all(axis=0)
    above = values[:, inside].astype(np.float64) - 0.5
    whole = sign_flip(above, seed=3)
    theirs = stats.ttest_1samp(above, 0, alternative="greater")
    np.testing.assert_allclose(10 ** -_group(tmp_path, "logp")[inside], whole.p_fwe, rtol=1e-5)
    np.testing.assert_allclose(_group(tmp_path, "t")[inside], theirs.statistic, rtol=1e-5)
    q = stats.false_discovery_control(theirs.pvalue)
    np.testing.assert_allclose(10 ** -_group(tmp_path, "logq")[inside], q, rtol=1e-4)
    assert row["n_centres"] == inside.sum()
    mean = nibabel.load(tmp_path / "maps/group_roi-V1_target-all_accuracy_searchlight.nii.gz")
    np.testing.assert_allclose(mean.affine, AFFINE, rtol=1e-6)
    top = np.unravel_index(np.nanargmax(np.asarray(mean.dataobj)), mean.shape)
    at = [row[f"{axis}_mm"] for axis in "xyz"]
    np.testing.assert_allclose(at, nibabel.affines.apply_affine(mean.affine, top), atol=0.01)
    assert row["p_flip_least"] == 1 / 5001
    assert row["above_fwe"] == int((whole.p_fwe < 0.05).sum())


def test_memory_does_not_grow_with_subjects(tmp_path: Path) -> None:
    """16 and 128 subjects, 5000 sign patterns: never are all maps of the latter in memory."""
    shape, peaks = (20, 20, 18), []
    for n in (16, 128):
        records = _subjects(tmp_path / f"{n}", n, shape)
        tracemalloc.start()
        row = group_maps(tmp_path / f"{n}", records, block_bytes=512 << 10)[0]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert row["n_centres"] > 0.85 * np.prod(shape)
    assert peaks[1] < peaks[0] + (1 << 20), [peak >> 10 for peak in peaks]
    assert peaks[1] < 128 * 8 * row["n_centres"], peaks[1] >> 10


def test_a_full_disk_is_told_and_no_common_centre_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = _subjects(tmp_path, 2, (4, 3, 2))
    grid = Grid(shape=(4, 3, 2), affine=AFFINE)
    with monkeypatch.context() as patch:
        patch.setattr(stack_module, "preallocate", _full)
        with pytest.raises(NoSpace, match="is full"):
            group_maps(tmp_path, records)
    for number, voxels in enumerate((np.arange(5), np.arange(10, 15))):
        name = f"sub-{number:03d}_roi-V1_target-all_accuracy_searchlight"
        save_map(tmp_path, name, np.ones(5), voxels, grid, {})
    assert "no centre lies in every subject's region" in group_maps(tmp_path, records)[0]["note"]
    for number in range(2):
        name = f"sub-{number:03d}_roi-V1_target-all_accuracy_searchlight"
        save_map(tmp_path, name, np.full(5, np.nan), np.arange(5), grid, {})
    assert "no centre lies in every subject's region" in group_maps(tmp_path, records)[0]["note"]


def _full(fd: int, path: Path, size_bytes: int) -> str:
    raise NoSpace(f"{path} is full")


def test_all_at_chance_is_nothing_found(tmp_path: Path) -> None:
    """A third is no float32: rounded, it lies above chance in every subject."""
    grid, rng = Grid(shape=(4, 4, 4), affine=AFFINE), np.random.default_rng(0)
    for number in range(6):
        values = rng.normal(0.4, 0.1, 64)
        values[7] = 1 / 3
        image = map_image(values, np.arange(64), grid, outside=float("nan"))
        (tmp_path / "maps").mkdir(exist_ok=True)
        nibabel.save(image, tmp_path / "maps" / f"sub-{number}_searchlight.nii.gz")
    with stacked(_files(tmp_path), [1 / 3] * 6, scratch=tmp_path, block_bytes=1 << 20) as stack:
        above = np.concatenate(list(stack.blocks()), axis=1)
    assert (above[:, 7] == 0).all()
    assert np.isnan(sign_flip(above).p_fwe[7])
