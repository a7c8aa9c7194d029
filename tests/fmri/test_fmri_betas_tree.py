"""`raypipe fmri betas` from an fMRIPrep tree against nilearn: several runs, confounds, scrubbing, noise."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
from bids_kit import AFFINE, N_VOLUMES, T_R_S, command, make_tree, region, scans
from nilearn.glm.first_level import FirstLevelModel
from nilearn.interfaces.fmriprep import load_confounds

from raypipe.cli import main

pytestmark = pytest.mark.usefixtures("no_page")

STRATEGY = ("motion", "scrub")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("models"))


def flags(root: Path, run_dir: Path, *more: str) -> list[str]:
    return command(
        "betas", root, run_dir, "--raw-dir", str(root / "raw"), "--subjects", "02",
        "--roi", f"yes={root}/rois/yes.nii.gz", "--strategy", *STRATEGY, "--motion", "basic", *more,
    )  # fmt: skip


def events_of(root: Path, path: Path) -> pd.DataFrame:
    stem = path.name.split("_space-")[0]
    (table,) = (root / "raw").rglob(f"{stem}_events.tsv")
    return pd.read_csv(table, sep="\t")[["onset", "duration", "trial_type"]]


def nilearns(
    root: Path,
    paths: Sequence[Path],
    tables: Sequence[pd.DataFrame],
    asked: Sequence[str],
    noise: str,
    kind: str = "effect_size",
) -> np.ndarray:
    """(x, y, z, len(asked)) of one FirstLevelModel of ``paths``, in float64."""
    mask = region(root, root / "rois" / "yes.nii.gz", scans(root, "02"))
    found = [load_confounds(str(path), strategy=STRATEGY, motion="basic") for path in paths]
    images = [nibabel.Nifti1Image(nibabel.load(path).get_fdata(), AFFINE) for path in paths]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FirstLevelModel(t_r=T_R_S, mask_img=mask, noise_model=noise)
        model.fit(
            images,
            events=list(tables),
            confounds=[one for one, _ in found],
            sample_masks=[kept for _, kept in found],
        )
        maps = [model.compute_contrast(one, output_type=kind) for one in asked]
    return np.stack([np.asarray(one.dataobj) for one in maps], axis=3)


def image(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj, np.float64)


def same(ours: np.ndarray, theirs: np.ndarray, **tolerance: Any) -> None:
    """Equal in the region that all runs have; nilearn says 0 outside, and ours may have more there."""
    inside = np.any(theirs != 0, axis=-1) if theirs.ndim == 4 else theirs != 0
    assert inside.sum() > 20
    np.testing.assert_allclose(ours[inside], theirs[inside], **tolerance)


@pytest.mark.parametrize("noise", ["ar1", "ols"])
def test_conditions_over_runs_are_nilearns(root: Path, tmp_path: Path, noise: str) -> None:
    more = ["--method", "conditions", "--contrast", "d=face - house", "--noise", noise]
    assert main(flags(root, tmp_path / "run", *more)) == 0
    paths = scans(root, "02")
    assert len(paths) == 4
    tables = [events_of(root, path) for path in paths]
    for kind, theirs, rtol in (("effect", "effect_size", 1e-4), ("t", "stat", 1e-4)):
        name = f"maps/sub-02_roi-yes_target-conditions_d_{kind}.nii.gz"
        reference = nilearns(root, paths, tables, ["face - house"], noise, theirs)[..., 0]
        same(image(tmp_path / "run" / name), reference, rtol=rtol, atol=1e-4)
    told = json.loads((tmp_path / "run/units/sub-02_roi-yes_target-conditions.json").read_text())
    assert (
        4 * 4 <= told["scrubbed"] < N_VOLUMES
    )  # four shaken volumes a run, and what is left between


@pytest.mark.parametrize("noise", ["ar1", "ols"])
@pytest.mark.parametrize("method", ["lsa", "lss"])
def test_trials_of_each_run_are_nilearns(
    root: Path, tmp_path: Path, method: str, noise: str
) -> None:
    more = ["--method", method, "--noise", noise, "--runs", "2"]
    assert main(flags(root, tmp_path / "run", *more)) == 0
    for path, session in zip(scans(root, "02")[1::2], ("a", "b"), strict=True):
        table = events_of(root, path)
        n = len(table)
        if method == "lsa":
            each = table.assign(trial_type=[f"t{i:02d}" for i in range(n)])
            reference = nilearns(root, [path], [each], each["trial_type"].tolist(), noise)
        else:
            columns = []
            for trial in range(n):
                one = table.copy()
                one.loc[trial, "trial_type"] = "one"
                columns.append(nilearns(root, [path], [one], ["one"], noise))
            reference = np.concatenate(columns, axis=3)
        stem = f"sub-02_ses-{session}_task-look_run-2_roi-yes"
        ours = image(tmp_path / "run" / "betas" / f"{stem}_betas.nii.gz")
        same(ours, reference, rtol=1e-4, atol=1e-4)
        trials = pd.read_csv(tmp_path / "run" / "betas" / f"{stem}_trials.tsv", sep="\t")
        assert trials["trial_type"].tolist() == table["trial_type"].tolist()


def test_noise_changes_the_numbers_and_the_key(root: Path, tmp_path: Path) -> None:
    """AR(1) and white noise are two models: neither may be taken for the other's results."""
    made = {}
    for noise in ("ar1", "ols"):
        one_run = ["--sessions", "a", "--runs", "1", "--noise", noise]
        assert main(flags(root, tmp_path / "run", *one_run)) == 0
        path = tmp_path / "run/units/sub-02_roi-yes_target-ses-a-task-look-run-1.json"
        values = image(tmp_path / "run/betas/sub-02_ses-a_task-look_run-1_roi-yes_betas.nii.gz")
        made[noise] = (json.loads(path.read_text())["key"], values[np.isfinite(values)])
    assert made["ar1"][0] != made["ols"][0]
    assert np.abs(made["ar1"][1] - made["ols"][1]).max() > 1e-3
