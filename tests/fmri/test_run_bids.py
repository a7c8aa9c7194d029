"""`raypipe fmri mvpa` from an fMRIPrep tree to the group, against a plain nilearn + scikit-learn loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bids_kit import SUBJECTS, command, make_tree, samples
from scipy import stats
from sklearn.model_selection import LeaveOneGroupOut, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from raypipe.cli import main

STRATEGY = ("motion", "high_pass")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("bids"))


def record(run_dir: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "units" / f"{name}.json").read_text())
    return found


def reference(root: Path, subject: str, region: str, **which: Any) -> dict[str, np.ndarray]:
    values, labels, runs = samples(root, subject, root / "rois" / f"{region}.nii.gz", **which)
    return cross_validate(
        make_pipeline(StandardScaler(), SVC(kernel="linear")),
        values,
        labels,
        groups=runs,
        cv=LeaveOneGroupOut(),
        scoring=["accuracy", "roc_auc"],
    )


def rois(root: Path) -> list[str]:
    return ["--roi", *(f"{name}={root}/rois/{name}.nii.gz" for name in ("yes", "no"))]


@pytest.mark.usefixtures("no_page")
def test_a_tree_is_decoded_as_a_plain_loop_does(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = command("mvpa", root, tmp_path / "run", *rois(root), "--strategy", *STRATEGY)
    assert main([*flags, "--scores", "accuracy", "roc_auc"]) == 0
    said = capsys.readouterr()
    means = {"yes": [], "no": []}
    for subject in SUBJECTS:
        for region in ("yes", "no"):
            theirs = reference(root, subject, region, strategy=STRATEGY)
            ours = record(tmp_path / "run", f"sub-{subject}_roi-{region}_target-all")
            n_test = ours["n_samples"] / 4
            accuracy, area = theirs["test_accuracy"], theirs["test_roc_auc"]
            np.testing.assert_allclose(ours["folds"]["accuracy"], accuracy, atol=1.01 / n_test)
            pairs = 24 * 24  # of samples, which float32 may order otherwise
            np.testing.assert_allclose(ours["folds"]["roc_auc"], area, atol=3 / pairs)
            assert [run["run"].split()[1:] for run in ours["runs"]] == [
                ["ses-a", "task-look", "run-1"], ["ses-a", "task-look", "run-2"],
                ["ses-b", "task-look", "run-1"], ["ses-b", "task-look", "run-2"],
            ]  # fmt: skip
            means[region].append(accuracy.mean())
    told = json.loads((tmp_path / "run" / "group.json").read_text())["rows"]
    rows = {row["roi"]: row for row in told if row["score"] == "accuracy"}
    # The planted region is decoded, the other is not; the group's t is scipy's of the loop's scores.
    assert np.mean(means["yes"]) > 0.7 > 0.6 > np.mean(means["no"])
    for region, scores in means.items():
        assert rows[region]["mean"] == pytest.approx(np.mean(scores), abs=0.01)
    above = []
    for subject in SUBJECTS:
        _, labels, _ = samples(root, subject, root / "rois" / "yes.nii.gz")
        guessing = np.unique(labels, return_counts=True)[1].max() / len(labels)
        above.append(rows["yes"]["subjects"][subject] - guessing)
    assert rows["yes"]["t"] == pytest.approx(stats.ttest_1samp(above, 0).statistic)
    # n/a in the first row of fMRIPrep's tables is said, never silent.
    assert "have no value in the first row" in said.err


@pytest.mark.usefixtures("no_page")
def test_sessions_and_subjects_are_chosen(root: Path, tmp_path: Path) -> None:
    chosen = ["--subjects", "sub-02", "--sessions", "b", "--runs", "01", "2"]
    flags = command("mvpa", root, tmp_path / "run", *rois(root), *chosen)
    assert main([*flags, "--scores", "accuracy"]) == 0
    assert {path.name[:6] for path in (tmp_path / "run/units").iterdir()} == {"sub-02"}
    ours = record(tmp_path / "run", "sub-02_roi-yes_target-all")
    theirs = reference(root, "02", "yes", sessions=["b"])["test_accuracy"]
    np.testing.assert_allclose(ours["folds"]["accuracy"], theirs, atol=1.01 * 2 / ours["n_samples"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--subjects", "01", "09"], "subject 09 is not in {prep}; found: 01, 02, 03"),
        (["--subjects", "02", "--sessions", "c"], "no run in {prep} matches; there is: ses a, b;"),
        (["--runs", "7"], "there is: ses a, b; task look, rest; run 1, 2; space"),
        (["--task", "taste"], "task look, rest"),
        (["--space", "T2w"], f"space {'MNI152NLin2009cAsym'}, T1w"),
        (["--task", "None", "--space", "T1w"], "header"),
        (["--space", "None"], "there are several spaces"),
        (["--task", "None"], "there are several tasks, look, rest; choose one by task"),
        (["--desc", "smooth"], "holds no *_desc-smooth_bold.nii.gz"),
        (["--raw-dir", "absent"], "absent does not exist; give the BIDS data set"),
        (["--bids-dir", "absent"], "absent does not exist; give the fMRIPrep output"),
    ],
)
def test_what_is_not_there_is_one_line(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    words: str,
) -> None:
    flags = command("mvpa", root, tmp_path / "run", *rois(root), *more)
    assert main(flags) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "raypipe: " in line]
    assert len(said) == 1
    assert words.format(prep=root / "prep") in said[0]
    assert not (tmp_path / "run").exists(), "nothing is written before it is known to work"
