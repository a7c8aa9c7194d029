"""Options of a run, each by the command, each against nilearn or scikit-learn on the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
from bids_kit import (
    AFFINE,
    N_ROI,
    N_VOLUMES,
    SHAPE,
    command,
    make_tree,
    nilearns,
    region,
    samples,
    save,
    scans,
)
from nilearn.image import resample_to_img
from nilearn.maskers import NiftiLabelsMasker, NiftiSpheresMasker
from scipy.stats import pearsonr
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import LeaveOneGroupOut, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

from raypipe.cli import main

pytestmark = pytest.mark.usefixtures("no_page")

ONE = ("--subjects", "01")
DONE = "sub-01_roi-yes_target-{}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree, an atlas of two regions on its grid, and region "yes" on a finer one."""
    root = make_tree(tmp_path_factory.mktemp("bids"))
    labels = np.zeros(np.prod(SHAPE), np.int16)
    labels[:N_ROI], labels[150 : 150 + N_ROI] = 3, 7
    save(labels.reshape(SHAPE), root / "rois" / "atlas.nii.gz")
    (root / "rois" / "atlas.tsv").write_text("index\tname\n3\tFFA\n7\tV1\n")
    values = (labels == 3).astype(np.uint8).reshape(SHAPE)
    shape = tuple(2 * n for n in SHAPE)
    fine = AFFINE @ np.diag([0.5, 0.5, 0.5, 1.0])
    fine[:3, 3] -= AFFINE[:3, :3].sum(axis=1) / 4  # its voxels' corners are the coarse ones'
    finer = np.kron(values, np.ones((2, 2, 2), np.uint8))
    assert finer.shape == shape
    save(finer, root / "rois" / "fine.nii.gz", fine)
    return root


@pytest.fixture
def run_roi(root: Path, tmp_path: Path) -> Callable[..., list[tuple[dict[str, Any], np.ndarray]]]:
    """Runs ``fmri roi`` of subject 01; gives each row of the table with its series."""

    def run(*more: str) -> list[tuple[dict[str, Any], np.ndarray]]:
        assert main(command("roi", root, tmp_path / "roi", *ONE, *more)) == 0
        table = pd.read_csv(tmp_path / "roi" / "series.tsv", sep="\t", dtype={"subject": str})
        return [(row, np.load(tmp_path / "roi" / row["file"])) for row in table.to_dict("records")]

    return run


@pytest.fixture
def run_mvpa(root: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs ``fmri mvpa`` on region "yes" of subject 01; gives the record of ``target``."""

    def run(*more: str, target: str = "all") -> dict[str, Any]:
        roi = ["--roi", f"yes={root}/rois/yes.nii.gz"]
        assert main(command("mvpa", root, tmp_path / "mvpa", *ONE, *roi, *more)) == 0
        text = (tmp_path / "mvpa" / "units" / f"{DONE.format(target)}.json").read_text()
        found: dict[str, Any] = json.loads(text)
        return found

    return run


def yes(root: Path, **which: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return samples(root, "01", root / "rois" / "yes.nii.gz", **which)


def of_run(root: Path, row: dict[str, Any]) -> Path:
    """The scan that a row of the table is of."""
    stem = f"_ses-{row['session']}_task-look_run-{row['run']}_"
    return next(path for path in scans(root, "01") if stem in path.name)


def test_regions_of_an_atlas_are_nilearns(root: Path, run_roi: Callable[..., Any]) -> None:
    atlas = root / "rois" / "atlas.nii.gz"
    names = ["--atlas-names", str(atlas.with_name("atlas.tsv")), "--reduce", "mean"]
    found = run_roi("--atlas", str(atlas), *names, "--detrend", "--standardize", "psc")
    assert {row["roi"] for row, _ in found} == {"FFA", "V1"}
    for row, ours in found:
        path = of_run(root, row)
        masked = region(root, np.ones(SHAPE), [path])
        theirs, _ = nilearns(
            path, atlas, masker=NiftiLabelsMasker, mask_img=masked, detrend=True, standardize="psc"
        )
        column = {"FFA": 0, "V1": 1}[row["roi"]]
        np.testing.assert_allclose(ours[:, 0], theirs[:, column], atol=2e-3)
    chosen = run_roi("--atlas", str(atlas), "--atlas-labels", "7", "--reduce", "mean")
    assert [row["roi"] for row, _ in chosen] == [7] * 4
    for (_, by_number), (_, by_name) in zip(
        chosen, [one for one in found if one[0]["roi"] == "V1"], strict=True
    ):
        r = pearsonr(by_number[:, 0], by_name[:, 0]).statistic
        assert r > 0.3, "the same region, not detrended"


def test_spheres_are_nilearns(root: Path, run_roi: Callable[..., Any]) -> None:
    centre = (0.0, 2.0, 1.0)
    sphere = f"FFA={','.join(map(str, centre))}"
    for row, ours in run_roi("--sphere", sphere, "--radius-mm", "6", "--reduce", "mean"):
        path = of_run(root, row)
        theirs, _ = nilearns(
            path,
            [centre],
            masker=NiftiSpheresMasker,
            radius=6.0,
            mask_img=region(root, np.ones(SHAPE), [path]),
            standardize=None,
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


# Strategy -> flags, and the same in load_confounds' words.
STRATEGIES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "motion high_pass": (["--motion", "derivatives"], {"motion": "derivatives"}),
    "motion high_pass wm_csf global_signal": (["--wm-csf", "full"], {"wm_csf": "full"}),
    "high_pass scrub": (
        ["--scrub", "0", "--fd-threshold-mm", "0.4"], {"scrub": 0, "fd_threshold": 0.4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_confounds_and_scrubbing_are_nilearns(
    root: Path, run_roi: Callable[..., Any], strategy: str
) -> None:
    flags, load = STRATEGIES[strategy]
    image = root / "rois" / "yes.nii.gz"
    chosen = ["--roi", f"yes={image}", "--strategy", *strategy.split(), *flags]
    for row, ours in run_roi(*chosen, "--detrend", "--standardize", "zscore_sample"):
        path = of_run(root, row)
        theirs, kept = nilearns(
            path, region(root, image, [path]), strategy.split(), load,
            detrend=True, standardize="zscore_sample",
        )  # fmt: skip
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
        assert row["scrubbed"] == N_VOLUMES - len(kept)
        assert (row["scrubbed"] > 0) is ("scrub" in strategy)


def test_decoding_of_scrubbed_runs_is_the_loops(root: Path, run_mvpa: Callable[..., Any]) -> None:
    strategy = ("high_pass", "scrub")
    ours = run_mvpa("--strategy", *strategy, "--scrub", "0", "--scores", "accuracy")
    values, labels, runs = yes(root, strategy=strategy, load={"scrub": 0})
    assert ours["n_samples"] == len(labels) < len(yes(root)[1])
    model = make_pipeline(StandardScaler(), SVC(kernel="linear"))
    theirs = cross_val_score(model, values, labels, groups=runs, cv=LeaveOneGroupOut())
    np.testing.assert_allclose(ours["folds"]["accuracy"], theirs, atol=4.1 / len(labels))


def test_a_mask_on_another_grid_is_refused_or_resampled_as_nilearn_does(
    root: Path, run_roi: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine = root / "rois" / "fine.nii.gz"
    flags = [*ONE, "--roi", f"yes={fine}"]
    assert main(command("roi", root, tmp_path / "none", *flags)) == 2
    err = capsys.readouterr().err
    assert "fine.nii.gz has (16, 14, 12) voxels, the scan (8, 7, 6); give resample" in err
    for row, ours in run_roi("--roi", f"yes={fine}", "--resample"):
        path = of_run(root, row)
        moved = resample_to_img(
            fine, nibabel.load(path).slicer[..., 0], interpolation="nearest",
            copy_header=True, force_resample=True,
        )  # fmt: skip
        theirs, _ = nilearns(
            path, region(root, np.asarray(moved.dataobj), [path]), standardize=None
        )
        assert theirs.shape[1] >= N_ROI - 2
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_without_a_cache_a_tree_gives_the_same_and_leaves_nothing(
    root: Path, run_mvpa: Callable[..., Any], tmp_path: Path
) -> None:
    stored = run_mvpa("--cache-dir", str(tmp_path / "a"))
    assert list((tmp_path / "a").rglob("data.npy"))
    (tmp_path / "mvpa").rename(tmp_path / "before")
    streamed = run_mvpa("--no-cache", "--cache-dir", str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()
    assert set(streamed["ways"]) == {"one pass"}
    for name in ("folds", "predicted", "key"):
        assert streamed[name] == stored[name]


def test_numbers_are_regressed_as_scikit_learn_does(
    root: Path, run_mvpa: Callable[..., Any]
) -> None:
    more = ("--target", "number:rating", "--regressor", "ridge", "--alpha", "20")
    ours = run_mvpa(*more, "--scores", "r", "r2", target="rating")
    values, labels, runs = yes(root, column="rating")
    labels = labels.astype(float)
    r, r2 = [], []
    for train, test in LeaveOneGroupOut().split(values, labels, runs):
        model = make_pipeline(StandardScaler(), Ridge(alpha=20.0)).fit(values[train], labels[train])
        predicted = model.predict(values[test])
        r.append(pearsonr(labels[test], predicted).statistic)
        r2.append(r2_score(labels[test], predicted))
    np.testing.assert_allclose(ours["folds"]["r"], r, atol=1e-3)
    np.testing.assert_allclose(ours["folds"]["r2"], r2, atol=1e-3)
    assert ours["scores"]["r"] > 0.6


def test_an_estimator_by_import_path_is_scikit_learns(
    root: Path, run_mvpa: Callable[..., Any]
) -> None:
    model = ("--estimator", "sklearn.svm.LinearSVC", "--params", "C=0.01", "max_iter=20000")
    ours = run_mvpa(*model, "--scores", "accuracy")
    values, labels, runs = yes(root)
    made = make_pipeline(StandardScaler(), LinearSVC(C=0.01, max_iter=20000))
    theirs = cross_val_score(made, values, labels, groups=runs, cv=LeaveOneGroupOut())
    np.testing.assert_allclose(ours["folds"]["accuracy"], theirs, atol=4.1 / len(labels))
    assert ours["estimator"] == "sklearn.svm.LinearSVC"


def test_folds_that_mix_runs_are_computed_and_their_danger_named(
    root: Path, run_mvpa: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ours = run_mvpa("--cv", "shuffled", "--n-folds", "4", "--seed", "3", "--scores", "accuracy")
    danger = "folds mix runs: 4 of 4 runs are in training and in test of one fold"
    assert danger in capsys.readouterr().err
    assert any(danger in text for text in ours["warnings"])
    values, labels, _ = yes(root)
    model = make_pipeline(StandardScaler(), SVC(kernel="linear"))
    cv = StratifiedKFold(4, shuffle=True, random_state=3)
    theirs = cross_val_score(model, values, labels, cv=cv)
    np.testing.assert_allclose(ours["folds"]["accuracy"], theirs, atol=4.1 / len(labels))
