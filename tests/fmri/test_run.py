"""`raypipe fmri mvpa` and `roi` from files to results, without Ray: numbers, resume, failures, memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest
from nilearn.maskers import NiftiMasker
from run_kit import AFFINE, N_RUNS, N_VOLUMES, SHAPE, make_data, mvpa_config, roi_config
from sklearn.model_selection import LeaveOneGroupOut, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from raypipe.cli import main
from raypipe.errors import InputError, MemoryBudgetExceeded
from raypipe.fmri import series as series_module
from raypipe.fmri import work as work_module
from raypipe.fmri.clean import CleanConfig
from raypipe.fmri.commands import FmriSummary, mvpa, roi
from raypipe.fmri.config import MvpaJobConfig
from raypipe.fmri.mvpa import MvpaConfig
from raypipe.memory.config import MemoryFlags, resolve
from raypipe.memory.guard import NoGuard, guarding
from raypipe.read.confounds import ConfoundsConfig
from raypipe.runner import LocalRunner


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return make_data(tmp_path / "data")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The scans that were read, as they are."""
    seen: list[str] = []
    real = series_module.obtain

    def obtain(scan: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(scan.path.name)
        return real(scan, *args, **kwargs)

    monkeypatch.setattr(series_module, "obtain", obtain)
    return seen


def run(cfg: MvpaJobConfig) -> FmriSummary:
    return mvpa(cfg, LocalRunner())


def record(cfg: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((cfg.run_dir / "units" / f"{name}.json").read_text())
    return found


def written(cfg: Any) -> dict[str, int]:
    """Unit file -> when it was written."""
    return {path.name: path.stat().st_mtime_ns for path in (cfg.run_dir / "units").iterdir()}


def patterns(table: Path, subject: str, region: str) -> tuple[np.ndarray, ...]:
    """(patterns, labels, runs) of every volume, by nilearn and the events as they were written."""
    folder, parts, labels = table.parent, [], []
    for number in range(1, N_RUNS + 1):
        masker = NiftiMasker(
            folder / "rois" / f"{region}.nii.gz", detrend=True, standardize="zscore_sample"
        )
        parts.append(masker.fit_transform(folder / f"sub-{subject}_run-{number}_bold.nii.gz"))
        rows = (folder / f"sub-{subject}_run-{number}_events.tsv").read_text().split("\n")[1:-1]
        labels += [row.split("\t")[2] for row in rows for _ in range(5)]
    return np.vstack(parts), np.array(labels), np.repeat(np.arange(N_RUNS), N_VOLUMES)


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


def test_a_finished_unit_is_never_computed_again(
    table: Path, tmp_path: Path, reads: list[str]
) -> None:
    cfg = mvpa_config(table, tmp_path / "run")
    run(cfg)
    assert len(reads) == 2 * N_RUNS, "one pass a scan serves both regions"
    before = written(cfg)
    reads.clear()
    again = run(cfg)
    assert (again.computed, again.found) == (0, 4)
    assert reads == []
    assert written(cfg) == before
    assert len(again.group) == 2, "the group is tested from what is there"


def test_a_changed_option_or_input_is_computed_again(
    table: Path, tmp_path: Path, reads: list[str]
) -> None:
    cfg = mvpa_config(table, tmp_path / "run")
    run(cfg)
    other = replace(cfg, mvpa=replace(cfg.mvpa, scale="centre"))
    assert run(other).computed == 4
    reads.clear()
    events = table.parent / "sub-02_run-1_events.tsv"
    events.write_text(
        events.read_text().replace("cat", "DOG").replace("dog", "cat").replace("DOG", "dog")
    )
    changed = run(other)
    assert (changed.computed, changed.found) == (2, 2)
    assert {name[:6] for name in reads} == {"sub-02"}
    mask = table.parent / "rois" / "no.nii.gz"
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[5] = 1
    nibabel.save(nibabel.Nifti1Image(voxels, AFFINE), mask)
    assert run(other).computed == 2, "both subjects' unit of that region"


def test_a_touched_or_moved_input_is_not(table: Path, tmp_path: Path) -> None:
    cfg = mvpa_config(table, tmp_path / "run")
    run(cfg)
    moved = tmp_path / "elsewhere"
    table.parent.rename(moved)
    for path in moved.rglob("*"):
        path.touch()
    found = run(replace(mvpa_config(moved / table.name, tmp_path / "run")))
    assert (found.computed, found.found) == (0, 4)


def test_one_bad_subject_fails_its_units_and_no_others(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reads: list[str]
) -> None:
    make_data(tmp_path / "more", ("03",))
    lines = (tmp_path / "more" / "runs.csv").read_text().splitlines()[1:]
    for path in (tmp_path / "more").glob("sub-03*"):
        path.rename(table.parent / path.name)
    table.write_text("\n".join([table.read_text().rstrip("\n"), *lines]) + "\n")
    cut = table.parent / "sub-02_run-2_bold.nii.gz"
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    (table.parent / "sub-03_run-1_bold.nii.gz").rename(tmp_path / "away.nii.gz")
    cfg = mvpa_config(table, tmp_path / "run")
    with pytest.raises(InputError, match="4 of 6 units failed, each named above"):
        run(cfg)
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("failed: ")]
    assert len(said) == 4
    for region in ("yes", "no"):
        assert record(cfg, f"sub-01_roi-{region}_target-all")["status"] == "done"
        for subject, words in (("02", "sub-02_run-2_bold"), ("03", "sub-03_run-1_bold")):
            name = f"sub-{subject}_roi-{region}_target-all"
            assert sum(name in line and words in line for line in said) == 1
            assert record(cfg, name)["status"] == "failed"
            assert words in record(cfg, name)["reason"]
    told = json.loads((cfg.run_dir / "run.json").read_text())["summary"]
    assert (told["computed"], len(told["failed"])) == (2, 4)
    cut.write_bytes(whole)
    (tmp_path / "away.nii.gz").rename(table.parent / "sub-03_run-1_bold.nii.gz")
    reads.clear()
    mended = run(cfg)
    assert (mended.computed, mended.found) == (4, 2)
    assert {name[:6] for name in reads} == {"sub-02", "sub-03"}


def test_a_lost_input_keeps_the_results_that_are_there(table: Path, tmp_path: Path) -> None:
    cfg = mvpa_config(table, tmp_path / "run")
    run(cfg)
    before = written(cfg)
    scan = table.parent / "sub-01_run-1_bold.nii.gz"
    scan.rename(tmp_path / "away.nii.gz")
    with pytest.raises(InputError, match="2 of 4 units failed"):
        run(cfg)
    assert written(cfg) == before
    (tmp_path / "away.nii.gz").rename(scan)
    assert run(cfg).found == 4


def test_a_bad_region_fails_alone(table: Path, tmp_path: Path) -> None:
    empty = table.parent / "rois" / "empty.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros(SHAPE, np.uint8), AFFINE), empty)
    cfg = mvpa_config(table, tmp_path / "run")
    cfg = replace(cfg, roi=(*cfg.roi, f"empty={empty}"))
    with pytest.raises(InputError, match="2 of 6 units failed"):
        run(cfg)
    assert "holds no voxel" in record(cfg, "sub-01_roi-empty_target-all")["reason"]
    assert record(cfg, "sub-01_roi-yes_target-all")["status"] == "done"


@pytest.mark.parametrize("what", ["sub-01_run-2_mask.nii.gz", "sub-01_run-2_events.tsv"])
def test_a_damaged_small_file_fails_its_subject_alone(
    table: Path, tmp_path: Path, what: str
) -> None:
    path = table.parent / what
    path.write_bytes(path.read_bytes()[:12])
    cfg = mvpa_config(table, tmp_path / "run")
    with pytest.raises(InputError, match="2 of 4 units failed"):
        run(cfg)
    assert what in record(cfg, "sub-01_roi-yes_target-all")["reason"]
    assert record(cfg, "sub-02_roi-yes_target-all")["status"] == "done"


def test_runs_of_one_name_are_told_apart_or_refused(table: Path, tmp_path: Path) -> None:
    table.write_text(table.read_text().replace("01,2,", "01,1,"))
    cfg = roi_config(table, tmp_path / "run")
    with pytest.raises(InputError, match="2 of 4 units failed"):
        roi(cfg, LocalRunner())
    assert "two runs are both sub-01_run-1" in record(cfg, "sub-01_roi-yes")["reason"]


def test_when_nothing_can_be_computed_nothing_is_written(table: Path, tmp_path: Path) -> None:
    cfg = mvpa_config(table, tmp_path / "run", query=replace_subjects("09"))
    with pytest.raises(
        InputError, match=r"none of 2 units .* subject 09 is not in .*found: 01, 02"
    ):
        run(cfg)
    assert not cfg.run_dir.exists()


def replace_subjects(*names: str) -> Any:
    from raypipe.read.bids import BidsQuery

    return BidsQuery(subjects=names)


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


def test_mapped_series_and_no_maps_give_the_same(table: Path, tmp_path: Path) -> None:
    name = "sub-01_roi-yes_target-all"
    folds = []
    for number, flags in enumerate(
        [{}, {"memmap_threshold": "0"}, {"use_memmap": False, "memmap_threshold": "0"}]
    ):
        cfg = mvpa_config(table, tmp_path / f"{number}")
        mvpa(cfg, LocalRunner(resolve(MemoryFlags(**flags))))  # type: ignore[arg-type]
        folds.append(record(cfg, name)["folds"])
        assert (cfg.run_dir / "scratch").exists() is (number == 1)
        assert not list((cfg.run_dir / "scratch").glob("*"))
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


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C while the ``number``-th unit is being decoded."""
    real: Callable[..., Any] = work_module.design_of
    calls = iter(range(1000))

    def design_of(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(work_module, "design_of", design_of)


def flags(table: Path, run_dir: Path, *more: str) -> list[str]:
    rois = [f"{name}={table.parent}/rois/{name}.nii.gz" for name in ("yes", "no")]
    return [
        *("fmri", "mvpa", "--table", str(table), "--run-dir", str(run_dir), "--roi", *rois),
        *("--delay-s", "0", "--scores", "accuracy", "--runner", "local"),
        *("--cache-dir", str(run_dir.parent / "cache"), *more),
    ]


def test_ctrl_c_keeps_what_is_finished(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = flags(table, tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert main(command) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert len(list((tmp_path / "run" / "units").glob("*.json"))) == 2
    assert main(command) == 0
    assert "2 units in" in capsys.readouterr().err
    summary = json.loads((tmp_path / "run" / "run.json").read_text())["summary"]
    assert (summary["computed"], summary["found"]) == (2, 2)


def test_the_command_line_and_its_own_config_file_are_one_run(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert main([*flags(table, run_dir), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "units: 4, 0 done before, 4 to compute" in told
    assert "predicted peak of a worker" in told
    assert "time: not measured yet" in told
    assert not run_dir.exists()
    assert main(flags(table, run_dir)) == 0
    assert "yes all accuracy: " in capsys.readouterr().out
    assert main(["fmri", "mvpa", "--config", str(run_dir / "config.yaml")]) == 0
    assert "0 units in 0.0 s, 4 were done before" in capsys.readouterr().err
    assert main([*flags(table, run_dir), "--target", "cat,dog", "--dry-run"]) == 0
    assert "by 4 finished units" in capsys.readouterr().out


def test_exit_codes(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = flags(table, tmp_path / "a", "--target", "cat,horse")
    assert main(wrong) == 2
    assert "class 'horse' has no sample; there are cat, dog" in capsys.readouterr().err
    small = flags(table, tmp_path / "b", "--max-memory-per-process", "600MiB")
    assert main(small) == 3
    assert "largest unit needs" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert main([*small, "--dry-run"]) == 3, "a dry run knows the budget too"
    broken = flags(table, tmp_path / "c", "--estimator", "fmri_broken.Model")
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "fmri_broken.py").write_text(
        "from sklearn.svm import SVC\nclass Model(SVC):\n"
        "    def fit(self, X, y):\n        raise ZeroDivisionError('its own fault')\n"
    )
    sys.path.insert(0, str(folder))
    try:
        assert main(broken) == 4
    finally:
        sys.path.remove(str(folder))
    err = capsys.readouterr().err
    assert err.count("ZeroDivisionError: its own fault") == 4
    assert "4 of 4 units failed" in err


class Pressed(NoGuard):
    """Memory is short at every boundary."""

    def pressure(self) -> bool:
        return True


def test_under_pressure_fewer_regions_are_read_at_once(
    table: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = mvpa_config(table, tmp_path / "run")
    monkeypatch.setattr(work_module, "current", Pressed)
    with guarding(Pressed()):
        assert run(cfg).computed == 4
    assert len(reads) == 2 * 2 * N_RUNS, "region by region"


def test_out_of_memory_halves_and_ends_at_one_region(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tried = work_module.joined, []

    def joined(cfg: Any, subject: Any, rois: list[str], **kwargs: Any) -> Any:
        tried.append(len(rois))
        if len(rois) > limit:
            raise MemoryError
        return real(cfg, subject, rois, **kwargs)

    monkeypatch.setattr(work_module, "joined", joined)
    limit = 1
    assert run(mvpa_config(table, tmp_path / "a")).computed == 4
    assert tried == [2, 1, 1, 2, 1, 1]
    limit = 0
    with pytest.raises(MemoryBudgetExceeded, match="out of memory with one ROI, yes of subject 01"):
        run(mvpa_config(table, tmp_path / "b"))


def test_a_second_run_in_the_same_folder_is_refused(table: Path, tmp_path: Path) -> None:
    from raypipe.errors import StoreLocked
    from raypipe.store.flocks import held

    cfg = mvpa_config(table, tmp_path / "run")
    cfg.run_dir.mkdir()
    with (
        held(cfg.run_dir / ".fmri.lock", "busy"),
        pytest.raises(StoreLocked, match="in use by another run"),
    ):
        run(cfg)
