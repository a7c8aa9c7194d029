"""`raypipe fmri mvpa` and `roi`: their numbers are nilearn's and scikit-learn's, however scans are read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest
from nilearn.maskers import NiftiMasker
from run_kit import (
    N_RUNS,
    N_VOLUMES,
    mvpa_config,
    patterns,
    record,
    roi_config,
    run,
)
from sklearn.model_selection import LeaveOneGroupOut, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from raypipe.fmri import work as work_module
from raypipe.fmri.clean import CleanConfig
from raypipe.fmri.commands import mvpa, roi
from raypipe.fmri.mvpa import MvpaConfig
from raypipe.memory.config import MemoryFlags, resolve
from raypipe.read.confounds import ConfoundsConfig
from raypipe.runner import LocalRunner

pytestmark = pytest.mark.usefixtures("no_page")


def test_scores_are_those_of_nilearn_and_scikit_learn(table: Path, tmp_path: Path) -> None:
    cfg = mvpa_config(table, tmp_path / "run")
    summary = run(cfg)
    assert (summary.units, summary.computed, summary.found) == (4, 4, 0)
    for subject in ("01", "02"):
        for region in ("yes", "no"):
            values, labels, runs = patterns(table, subject, region)
            model = make_pipeline(StandardScaler(), SVC(kernel="linear"))
            theirs = cross_val_score(model, values, labels, groups=runs, cv=LeaveOneGroupOut())
            ours = record(cfg, f"sub-{subject}_roi-{region}_target-all")
            np.testing.assert_allclose(ours["folds"]["accuracy"], theirs, atol=1 / 40)
            assert ours["n_samples"] == N_RUNS * N_VOLUMES
    rows = {row["roi"]: row for row in summary.group}
    assert rows["yes"]["mean"] > 0.9 > 0.65 > rows["no"]["mean"]
    assert json.loads((cfg.run_dir / "group.json").read_text())["rows"][0]["n_subjects"] == 2
    assert pq.read_table(cfg.run_dir / "group.parquet").num_rows == 2
    told = json.loads((cfg.run_dir / "run.json").read_text())
    assert told["kind"] == "fmri mvpa"
    assert told["summary"]["computed"] == 4


def test_without_a_cache_nothing_is_stored_and_scores_are_the_same(
    table: Path, tmp_path: Path, reads: list[str]
) -> None:
    stored, streamed = mvpa_config(table, tmp_path / "a"), mvpa_config(table, tmp_path / "b")
    streamed = replace(streamed, cache=False)
    run(stored)
    reads.clear()
    kept = sorted(stored.cache_dir.rglob("*")) if stored.cache_dir else []
    assert any(path.name == "data.npy" for path in kept)
    run(streamed)
    assert len(reads) == 2 * N_RUNS
    name = "sub-01_roi-yes_target-all"
    assert record(stored, name)["folds"] == record(streamed, name)["folds"]
    assert set(record(stored, name)["ways"]) == {"build"}
    assert set(record(streamed, name)["ways"]) == {"one pass"}
    third = mvpa_config(table, tmp_path / "c")
    run(third)
    assert set(record(third, name)["ways"]) == {"cached"}
    assert record(third, name)["folds"] == record(stored, name)["folds"]


def test_mapped_series_and_no_maps_give_the_same(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "sub-01_roi-yes_target-all"
    folds, mapped = [], []
    real = work_module.joined

    def joined(*args: Any, **kwargs: Any) -> Any:
        found = real(*args, **kwargs)
        mapped.append({isinstance(one.values, np.memmap) for one in found.values()})
        return found

    monkeypatch.setattr(work_module, "joined", joined)
    for number, flags in enumerate(
        [{}, {"memmap_threshold": "0"}, {"use_memmap": False, "memmap_threshold": "0"}]
    ):
        cfg = mvpa_config(table, tmp_path / f"{number}")
        mvpa(cfg, LocalRunner(resolve(MemoryFlags(**flags))))  # type: ignore[arg-type]
        folds.append(record(cfg, name)["folds"])
        assert mapped.pop() == {number == 1}
        left = {path.name for path in cfg.run_dir.iterdir()}
        assert not {name for name in left if name.startswith("tmp")} | (left & {"scratch"})
    assert folds[0] == folds[1] == folds[2]


def test_numbers_are_decoded_by_regression(table: Path, tmp_path: Path) -> None:
    cfg = mvpa_config(
        table, tmp_path / "run", target=("number:rating", "cat,dog"), mvpa=MvpaConfig()
    )
    summary = run(cfg)
    assert summary.computed == 8
    scores = record(cfg, "sub-01_roi-yes_target-rating")
    assert scores["estimator"] == "ridge"
    assert scores["scores"]["r"] > 0.7
    assert record(cfg, "sub-01_roi-yes_target-cat-dog")["scores"]["accuracy"] > 0.9


def test_a_table_of_labels_a_volume_tells_runs_within_a_scan(table: Path, tmp_path: Path) -> None:
    """One scan of three runs, as PyMVPA's data are, gives what three scans give."""
    folder = table.parent
    scans = [nibabel.load(folder / f"sub-01_run-{n}_bold.nii.gz") for n in (1, 2, 3)]
    nibabel.save(nibabel.concat_images(scans, axis=3), folder / "all.nii.gz")
    _, labels, runs = patterns(table, "01", "yes")
    (folder / "labels-01.txt").write_text(
        "\n".join(f"{a} {b}" for a, b in zip(labels, runs, strict=True)) + "\n"
    )
    one = folder / "one.csv"
    one.write_text("subject,bold\n01,all.nii.gz\n")
    events, plain = mvpa_config(table, tmp_path / "a"), mvpa_config(one, tmp_path / "b")
    run(events)
    run(replace(plain, labels=f"{folder}/labels-{{subject}}.txt"))
    name = "sub-01_roi-yes_target-all"
    assert record(plain, name)["folds"] == record(events, name)["folds"]


def test_permutations_stand_in_the_table(table: Path, tmp_path: Path) -> None:
    cfg = mvpa_config(
        table, tmp_path / "run", mvpa=MvpaConfig(scores=("accuracy",), n_permutations=19)
    )
    run(cfg)
    name = "sub-01_roi-yes_target-all"
    rows = pq.read_table(cfg.run_dir / "units" / f"{name}.parquet").to_pylist()
    kinds = [row["kind"] for row in rows]
    assert (kinds.count("fold"), kinds.count("null")) == (N_RUNS, 19)
    null = [row["value"] for row in rows if row["kind"] == "null"]
    told = record(cfg, name)
    assert told["null"]["accuracy"]["q95"] == pytest.approx(np.quantile(null, 0.95))
    assert told["p"]["accuracy"] == 1 / 20
    assert np.array(told["confusion"]).sum() == told["n_samples"]


@pytest.mark.parametrize("reduce", ["voxels", "mean"])
def test_time_series_are_nilearns(table: Path, tmp_path: Path, reduce: Any) -> None:
    folder = table.parent
    rng = np.random.default_rng(1)
    confounds = rng.normal(size=(N_VOLUMES, 2))
    path = folder / "confounds.tsv"
    rows = ["x\ty", *(f"{a}\t{b}" for a, b in confounds)]
    path.write_text("\n".join(rows) + "\n")
    text = table.read_text().splitlines()
    table.write_text("\n".join([f"{text[0]},confounds", *(f"{x},confounds.tsv" for x in text[1:])]))
    cfg = roi_config(
        table,
        tmp_path / "run",
        reduce=reduce,
        clean=CleanConfig(
            detrend=True, filter="butterworth", low_pass_hz=0.1, high_pass_hz=0.01,
            standardize="zscore_sample",
        ),
        confounds=ConfoundsConfig(columns=("x", "y")),
    )  # fmt: skip
    assert roi(cfg, LocalRunner()).computed == 4
    rows = pq.read_table(cfg.run_dir / "series.parquet").to_pylist()
    assert len(rows) == 2 * N_RUNS * 2
    assert (cfg.run_dir / "series.tsv").read_text().startswith("subject\t")
    masker_of: dict[str, Any] = {"detrend": True, "standardize": "zscore_sample", "t_r": 2.0}
    masker_of |= {"low_pass": 0.1, "high_pass": 0.01}
    for row in rows:
        ours = np.load(cfg.run_dir / row["file"])
        scan = folder / f"sub-{row['subject']}_run-{row['run']}_bold.nii.gz"
        region = folder / "rois" / f"{row['roi']}.nii.gz"
        if reduce == "voxels":
            theirs = NiftiMasker(region, **masker_of).fit_transform(scan, confounds=confounds)
        else:
            from nilearn.maskers import NiftiLabelsMasker

            masker = NiftiLabelsMasker(region, **masker_of)
            theirs = masker.fit_transform(scan, confounds=confounds)
        assert ours.dtype == np.float32
        assert ours.shape == theirs.shape == (row["n_volumes"], row["n_voxels"])
        np.testing.assert_allclose(ours, theirs, atol=2e-3 if reduce == "mean" else 1e-4)
    assert roi(cfg, LocalRunner()).found == 4
    (cfg.run_dir / rows[0]["file"]).unlink()
    assert roi(cfg, LocalRunner()).computed == 1, "a series that was removed is made again"
