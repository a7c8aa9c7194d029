"""fMRIPrep trees and run tables; who is missing is named; confounds as nilearn reads them; events."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from nilearn.interfaces.fmriprep import load_confounds

from raypipe.errors import ConfigError, InputError, MissingInput, RaypipeWarning, UnknownName
from raypipe.read.bids import BidsQuery, entities, find_runs
from raypipe.read.confounds import ConfoundsConfig, confounds_files, read_confounds
from raypipe.read.events import read_events
from raypipe.read.runfiles import RunFiles
from raypipe.read.runtable import read_run_table

MNI = "MNI152NLin2009cAsym"


def _touch(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def _tree(root: Path) -> Path:
    """Subjects 01 and 02 with sessions, two spaces, runs 1, 2 and 10 of one task; 03 without runs."""
    for subject in ("01", "02"):
        for run in ("1", "2", "10"):
            func = root / f"sub-{subject}" / "ses-a" / "func"
            stem = f"sub-{subject}_ses-a_task-look_run-{run}"
            for space in (MNI, "T1w"):
                _touch(func / f"{stem}_space-{space}_desc-preproc_bold.nii.gz")
                _touch(func / f"{stem}_space-{space}_desc-brain_mask.nii.gz")
            _touch(func / f"{stem}_desc-confounds_timeseries.tsv")
    (root / "sub-03").mkdir()
    return root


def test_runs_are_found_with_all_that_belongs_to_them(tmp_path: Path) -> None:
    root, raw = _tree(tmp_path / "prep"), tmp_path / "raw"
    events = _touch(raw / "sub-02/ses-a/func/sub-02_ses-a_task-look_run-2_events.tsv")
    runs = find_runs(root, BidsQuery(subjects=("sub-02",), space=MNI), raw_root=raw)
    assert [run.run for run in runs] == ["1", "2", "10"]
    func = root / "sub-02/ses-a/func"
    stem = "sub-02_ses-a_task-look_run-2"
    assert runs[1] == RunFiles(
        subject="02",
        session="a",
        task="look",
        run="2",
        space=MNI,
        bold=func / f"{stem}_space-{MNI}_desc-preproc_bold.nii.gz",
        mask=func / f"{stem}_space-{MNI}_desc-brain_mask.nii.gz",
        confounds=func / f"{stem}_desc-confounds_timeseries.tsv",
        events=events,
    )
    assert runs[0].events is None
    assert runs[1].name == "sub-02 ses-a task-look run-2"


def test_runs_are_chosen_by_entity(tmp_path: Path) -> None:
    root = _tree(tmp_path)
    query = BidsQuery(space="T1w", runs=("run-01", "10"), sessions=("ses-a",), task="look")
    runs = find_runs(root, query)
    assert [(run.subject, run.run) for run in runs] == [
        ("01", "1"), ("01", "10"), ("02", "1"), ("02", "10"),
    ]  # fmt: skip
    with pytest.raises(InputError, match=f"several spaces, {MNI}, T1w; choose one by space"):
        find_runs(root, BidsQuery())


def test_events_are_inherited_from_the_nearest_folder_above(tmp_path: Path) -> None:
    root, raw = _tree(tmp_path / "prep"), tmp_path / "raw"
    query = BidsQuery(subjects=("01",), space=MNI, runs=("1", "2"))
    for_all = _touch(raw / "task-look_events.tsv")
    _touch(raw / "task-rest_events.tsv")
    runs = find_runs(root, query, raw_root=raw)
    assert [run.events for run in runs] == [for_all] * 2
    of_subject = _touch(raw / "sub-01/sub-01_task-look_events.tsv")
    _touch(raw / "sub-01/sub-01_ses-b_task-look_events.tsv")
    own = _touch(raw / "sub-01/ses-a/func/sub-01_ses-a_task-look_run-2_events.tsv")
    _touch(raw / "sub-01/ses-a/func/sub-01_ses-a_task-look_run-3_events.tsv")
    runs = find_runs(root, query, raw_root=raw)
    assert [run.events for run in runs] == [of_subject, own]


def test_scans_in_native_space_are_chosen_by_that_word(tmp_path: Path) -> None:
    root = _tree(tmp_path)
    name = "sub-01_ses-a_task-look_run-1"
    native = _touch(root / "sub-01/ses-a/func" / f"{name}_desc-preproc_bold.nii.gz")
    with pytest.raises(InputError, match=f"several spaces, {MNI}, T1w, native; choose one by"):
        find_runs(root, BidsQuery(subjects=("01",)))
    assert [run.bold for run in find_runs(root, BidsQuery(space="native"))] == [native]


def test_what_is_missing_is_told_with_what_is_there(tmp_path: Path) -> None:
    root = _tree(tmp_path)
    with pytest.raises(MissingInput, match=r"subject 07, 08 is not in .*; found: 01, 02, 03$"):
        find_runs(root, BidsQuery(subjects=("07", "01", "08"), space=MNI))
    with pytest.raises(MissingInput, match="subject 03 has no run of that selection"):
        find_runs(root, BidsQuery(subjects=("03", "01"), space=MNI))
    with pytest.raises(
        MissingInput, match=r"no run in .* matches; there is: ses a; task look; run"
    ):
        find_runs(root, BidsQuery(task="rest"))
    with pytest.raises(MissingInput, match=r"holds no .*desc-denoised_bold"):
        find_runs(root, BidsQuery(desc="denoised"))
    with pytest.raises(MissingInput, match="does not exist"):
        find_runs(root / "absent", BidsQuery())


def test_entities_of_a_name() -> None:
    name = "sub-01_task-x_echo-2_space-T1w_desc-preproc_bold.nii.gz"
    assert entities(name) == {
        "sub": "01", "task": "x", "echo": "2", "space": "T1w", "desc": "preproc",
    }  # fmt: skip


def test_a_table_names_runs(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz", "m.nii"):
        _touch(tmp_path / name)
    text = "subject,run,bold,mask\nsub-10,1,a.nii.gz,m.nii\n2,1,b.nii.gz,\n"
    table = _touch(tmp_path / "runs.csv", text)
    runs = read_run_table(table)
    assert [(run.subject, run.bold.name) for run in runs] == [("2", "b.nii.gz"), ("10", "a.nii.gz")]
    assert (runs[0].mask, runs[1].mask) == (None, tmp_path / "m.nii")
    assert [run.subject for run in read_run_table(table, ["sub-2"])] == ["2"]
    with pytest.raises(MissingInput, match=r"subject 3 is not in .*; found: 2, 10"):
        read_run_table(table, ["3"])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("subject,run\n1,1\n", "has no column bold"),
        ("subject,bold,scan\n1,a.nii,x\n", "has a column 'scan'"),
        ("subject,bold\n1,absent.nii\n", "line 2: bold .* does not exist"),
        ("subject,bold\n,a.nii\n", "line 2 has no subject"),
        ("subject,bold\n1,a.nii\n2,a.nii\n", "twice, for sub-1 and sub-2"),
        ("subject,bold\n", "has no rows"),
    ],
)
def test_a_table_with_an_error_is_refused_by_line(tmp_path: Path, text: str, match: str) -> None:
    _touch(tmp_path / "a.nii")
    with pytest.raises(InputError, match=match):
        read_run_table(_touch(tmp_path / "runs.csv", text))


def _real_run(tmp_path: Path, real_data: Path) -> RunFiles:
    """A run whose confounds are nilearn's own fMRIPrep table; the scan itself is empty."""
    stem = tmp_path / "sub-01/func/sub-01_task-rest"
    bold = _touch(Path(f"{stem}_space-{MNI}_desc-preproc_bold.nii.gz"))
    for suffix in ("tsv", "json"):
        source = real_data / "confounds" / f"test_desc-confounds_regressors.{suffix}"
        shutil.copy(source, f"{stem}_desc-confounds_regressors.{suffix}")
    (run,) = find_runs(tmp_path, BidsQuery())
    assert run.bold == bold
    return run


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": ("motion", "high_pass", "wm_csf")},
        {"strategy": ("motion", "scrub"), "motion": "derivatives", "fd_threshold_mm": 0.2},
        {"strategy": ("high_pass", "compcor"), "n_compcor": 3},
    ],
)
def test_confounds_are_those_of_load_confounds(
    tmp_path: Path, real_data: Path, options: dict
) -> None:
    run, config = _real_run(tmp_path, real_data), ConfoundsConfig(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = read_confounds(run, config)
        frame, kept = load_confounds(
            str(run.bold),
            strategy=config.strategy,
            motion=config.motion,
            fd_threshold=config.fd_threshold_mm,
            n_compcor=config.n_compcor or "all",
            demean=False,
        )
    assert ours is not None
    assert ours.names == tuple(frame.columns)
    np.testing.assert_array_equal(ours.values, frame.to_numpy())
    assert np.isfinite(ours.values).all()
    np.testing.assert_array_equal(ours.kept, kept)


def test_a_first_row_without_value_is_filled_and_said(tmp_path: Path, real_data: Path) -> None:
    run = _real_run(tmp_path, real_data)
    with pytest.warns(RaypipeWarning, match=r"confounds of .* have no value in the first row"):
        read_confounds(run, ConfoundsConfig(strategy=("motion",)))
    names = ("csf", "csf_derivative1")
    with pytest.warns(RaypipeWarning, match=r"1 confounds of .*\(csf_derivative1\)"):
        ours = read_confounds(run, ConfoundsConfig(columns=names))
    assert ours is not None
    assert run.confounds is not None
    table = pd.read_csv(run.confounds, sep="\t")[list(names)].to_numpy()
    np.testing.assert_array_equal(ours.values[1:], table[1:])
    np.testing.assert_array_equal(ours.values[0], [table[0, 0], table[1, 1]])


def test_another_table_than_the_one_beside_the_scan_is_refused(
    tmp_path: Path, real_data: Path
) -> None:
    run = _real_run(tmp_path, real_data)
    assert run.confounds is not None
    named = replace(run, confounds=Path(shutil.copy(run.confounds, tmp_path / "mine.tsv")))
    with pytest.raises(
        InputError, match=r"strategy reads \S+_regressors.tsv, but \S+mine.tsv is named"
    ):
        read_confounds(named, ConfoundsConfig(strategy=("motion",)))
    assert read_confounds(named, ConfoundsConfig(columns=("csf",))) is not None


def test_compcor_depends_on_the_json_beside_the_table(tmp_path: Path, real_data: Path) -> None:
    run = _real_run(tmp_path, real_data)
    assert run.confounds is not None
    beside = run.confounds.with_suffix(".json")
    compcor = ConfoundsConfig(strategy=("high_pass", "compcor"))
    assert confounds_files(run, compcor) == [run.confounds, beside]
    assert confounds_files(run, ConfoundsConfig(strategy=("motion",))) == [run.confounds]
    assert confounds_files(run, ConfoundsConfig()) == []


def test_confounds_that_are_not_there_are_told(tmp_path: Path, real_data: Path) -> None:
    run = _real_run(tmp_path, real_data)
    assert read_confounds(run, ConfoundsConfig()) is None
    with pytest.raises(UnknownName, match="unknown confound 'csv'; nearest: csf"):
        read_confounds(run, ConfoundsConfig(columns=("csv",)))
    with pytest.raises(InputError, match=r"confounds of sub-\S+ .*cannot be read: .*AROMA"):
        read_confounds(run, ConfoundsConfig(strategy=("ica_aroma",)))
    with pytest.raises(ConfigError, match="compcor needs high_pass"):
        ConfoundsConfig(strategy=("compcor",))
    bare = RunFiles(subject="01", bold=run.bold)
    with pytest.raises(MissingInput, match="sub-01 has no confounds table"):
        read_confounds(bare, ConfoundsConfig(strategy=("motion",)))
    with pytest.raises(UnknownName, match="unknown confounds strategy 'motoin'; nearest: motion"):
        ConfoundsConfig(strategy=("motoin",))
    with pytest.raises(ConfigError, match="exclude each other"):
        ConfoundsConfig(strategy=("motion",), columns=("csf",))


def test_events_come_in_order_of_onset(tmp_path: Path) -> None:
    text = "onset\tduration\ttrial_type\n12.5\t2\tface\n0\t1.5\thouse\n20\t1\tn/a\n"
    events = read_events(_touch(tmp_path / "events.tsv", text))
    assert events.onset_s.tolist() == [0.0, 12.5]
    assert events.duration_s.tolist() == [1.5, 2.0]
    assert events.trial_type.tolist() == ["house", "face"]
    with pytest.raises(InputError, match="no column stimulus; there are onset, duration"):
        read_events(tmp_path / "events.tsv", "stimulus")
    with pytest.raises(InputError, match="missing or negative"):
        read_events(_touch(tmp_path / "bad.tsv", "onset\tduration\ttrial_type\n1\t-2\tface\n"))
    with pytest.raises(MissingInput, match="do not exist"):
        read_events(tmp_path / "absent.tsv")
