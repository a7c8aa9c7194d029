"""The group's searchlight maps against scipy and a plain loop over sign patterns."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from scipy import stats

from raypipe.fmri.masks import Grid
from raypipe.fmri.searchlight.settle import save_map
from raypipe.fmri.searchlight.together import group_maps

GRID = Grid(shape=(3, 2, 2), affine=np.diag([2.0, 2.0, 2.0, 1.0]))
N = 4


def _subjects(run_dir: Path, scores: np.ndarray, chances: list[float]) -> list[dict[str, Any]]:
    """Records and maps of subjects; the last voxel is missing in the first."""
    records = []
    for number, (values, chance) in enumerate(zip(scores, chances, strict=True)):
        name = f"sub-{number}_roi-V1_target-all"
        voxels = np.arange(11 if number == 0 else 12)
        save_map(run_dir, f"{name}_r_searchlight", values[voxels], voxels, GRID, {})
        records.append(
            {"unit": name, "subject": str(number), "roi": "V1", "target": "all", "space": "MNI"}
            | {"scores": {"r": float(values[voxels].max())}, "chance": {"r": chance}}
        )
    return records


def _map(run_dir: Path, kind: str) -> np.ndarray:
    image = nibabel.load(run_dir / "maps" / f"group_roi-V1_target-all_r_{kind}.nii.gz")
    return np.asarray(image.dataobj, np.float64).ravel()


def test_group_maps_are_scipys_at_the_centres_that_all_have(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    scores, chances = rng.normal(0.3, 0.3, (N, 12)), [0.0, 0.1, 0.05, 0.2]
    above = (scores - np.array(chances)[:, np.newaxis])[:, :11].astype(np.float32).astype(float)
    scores[:, 2] = np.array(chances) + 0.25  # all agree: no t
    row = group_maps(tmp_path, _subjects(tmp_path, scores, chances))[0]
    above[:, 2] = 0.25
    tested = np.delete(np.arange(11), 2)
    theirs = stats.ttest_1samp(above[:, tested], 0, alternative="greater")
    np.testing.assert_allclose(_map(tmp_path, "t")[tested], theirs.statistic, rtol=1e-4)
    np.testing.assert_allclose(
        _map(tmp_path, "searchlight")[:11], above.mean(0) + np.mean(chances), rtol=1e-5
    )
    q = stats.false_discovery_control(theirs.pvalue)
    np.testing.assert_allclose(10 ** -_map(tmp_path, "logq")[tested], q, rtol=1e-3)
    assert all(np.isnan(_map(tmp_path, kind)[11]) for kind in ("searchlight", "t", "logp"))
    assert (row["n_centres"], row["n_subjects"]) == (11, N)
    assert row["above_fdr"] == int((q < 0.05).sum())
    assert row["mean"] == pytest.approx((above.mean(0) + np.mean(chances)).max(), rel=1e-5)


def test_corrected_p_counts_the_highest_t_of_every_sign_pattern(tmp_path: Path) -> None:
    scores = np.random.default_rng(2).normal(0.4, 0.3, (N, 12))
    group_maps(tmp_path, _subjects(tmp_path, scores, [0.0] * N))
    above = scores[:, :11].astype(np.float32).astype(float)
    t = stats.ttest_1samp(above, 0).statistic
    highest = [
        stats.ttest_1samp(above * np.array(signs)[:, np.newaxis], 0).statistic.max()
        for signs in product((1, -1), repeat=N)
    ]
    p = [(np.array(highest) >= one - 1e-9).mean() for one in t]
    np.testing.assert_allclose(10 ** -_map(tmp_path, "logp")[:11], p, rtol=1e-5)


def test_subjects_on_other_grids_and_one_alone_have_no_group(tmp_path: Path) -> None:
    scores = np.random.default_rng(3).normal(size=(2, 12))
    records = _subjects(tmp_path, scores, [0.0, 0.0])
    assert "one subject" in group_maps(tmp_path, records[:1])[0]["note"]
    other = Grid(shape=GRID.shape, affine=np.diag([2.0, 2.0, 3.0, 1.0]))
    save_map(tmp_path, "sub-1_roi-V1_target-all_r_searchlight", scores[1], np.arange(12), other, {})
    assert "different grids" in group_maps(tmp_path, records)[0]["note"]
    assert not list((tmp_path / "maps").glob("group*"))
