"""Inputs of subjects put together: what must be alike, and what a unit's key depends on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from run_kit import mvpa_config, roi_config

from raypipe.errors import InputError
from raypipe.fmri import prepare
from raypipe.fmri.config import MvpaJobConfig, RoiConfig
from raypipe.fmri.content import content_of
from raypipe.fmri.glm import lay_out as betas_lay_out
from raypipe.fmri.glm.job import BetasConfig
from raypipe.fmri.inputs import SubjectInputs, check_alike
from raypipe.fmri.rois import wanted_rois
from raypipe.fmri.searchlight import lay_out as light_lay_out
from raypipe.fmri.searchlight.job import SearchlightJobConfig
from raypipe.fmri.series import Subject
from raypipe.read.nifti import open_scan
from raypipe.read.runfiles import RunFiles
from raypipe.read.runtable import read_run_table
from raypipe.read.sample import content_sample


def _subject(name: str, **more: str | None) -> SubjectInputs:
    run = RunFiles(subject=name, bold=Path(f"{name}.nii.gz"), **more)  # type: ignore[arg-type]
    return SubjectInputs(subject=name, runs=(run,), scans=(), roi_voxels={}, units=(), failed=())


def test_subjects_of_one_group_are_of_one_space_and_task() -> None:
    tree = RoiConfig(bids_dir=Path("prep"), run_dir=Path("run"))
    mni = _subject("01", space="MNI152", task="look")
    absent = SubjectInputs(subject="09", runs=(), scans=(), roi_voxels={}, units=(), failed=())
    check_alike(tree, [mni, _subject("02", space="MNI152", task="look"), absent])
    with pytest.raises(InputError, match="differ in space: MNI152, T1w; choose one by --space"):
        check_alike(tree, [mni, _subject("02", space="T1w", task="look")])
    with pytest.raises(InputError, match="differ in space: MNI152, native"):
        check_alike(tree, [mni, _subject("02", task="look")])
    other = _subject("02", space="MNI152", task="rest")
    with pytest.raises(InputError, match="differ in task: look, rest; choose one by --task"):
        check_alike(tree, [mni, other])
    check_alike(RoiConfig(table=Path("runs.csv"), run_dir=Path("run")), [mni, other])


@pytest.mark.parametrize("verb", ["mvpa", "searchlight", "betas"])
def test_every_plan_refuses_subjects_of_two_spaces(
    verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    where = {"bids_dir": tmp_path, "run_dir": tmp_path / "run", "cache_dir": tmp_path / "cache"}
    found = {"01": _subject("01", space="MNI152"), "02": _subject("02", space="T1w")}
    module = {"mvpa": prepare, "searchlight": light_lay_out, "betas": betas_lay_out}[verb]
    monkeypatch.setattr(module, "subjects_of", lambda cfg: tuple(found))
    monkeypatch.setattr(module, "look_at", lambda cfg, name, rois, targets: found[name])
    made: dict[str, Callable[[], Any]] = {
        "mvpa": lambda: prepare.make_plan(MvpaJobConfig(**where, delay_s=0.0), None, None),
        "searchlight": lambda: light_lay_out.lay_out(
            SearchlightJobConfig(**where, delay_s=0.0), None, None
        ),
        "betas": lambda: betas_lay_out.lay_out(BetasConfig(**where), None, None),
    }
    with pytest.raises(InputError, match="subjects differ in space: MNI152, T1w"):
        made[verb]()


@pytest.mark.parametrize("name", ["bold.nii", "bold.nii.gz"])
def test_a_mended_value_changes_what_a_scan_is_known_by(tmp_path: Path, name: str) -> None:
    """2 MiB, of which a sample holds half: one volume's value is mended where no sample lies."""
    path, values = tmp_path / name, np.ones((16, 16, 16, 256), np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    scan = open_scan(path)
    before, sample = content_of(scan), content_sample(path, scan.size_bytes)
    assert content_of(open_scan(path)) == before
    if not scan.compressed:
        with path.open("r+b") as file:
            file.seek(100_000)
            file.write(b"\x05")
        assert content_sample(path, scan.size_bytes) == sample  # it cannot tell
    else:
        values[8, 8, 8, 128] = 5
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), path)
    assert content_of(open_scan(path)) != before


def test_runs_of_two_repetition_times_are_no_fault_of_time_series(table: Path) -> None:
    """Each run is cleaned by its own header; only decoding has one delay for all."""
    runs = read_run_table(table, ("01",))
    image = nibabel.load(runs[1].bold)
    image.header.set_zooms((3.0, 3.0, 3.0, 1.5))
    nibabel.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header).to_filename(
        runs[1].bold
    )
    assert [scan.tr_s for scan in (open_scan(run.bold) for run in runs)] == [2.0, 1.5, 2.0]
    series = roi_config(table, table.parent / "run")
    assert len(Subject.open(series, runs, wanted_rois(series)).scans) == 3
    decoded = mvpa_config(table, table.parent / "run")
    with pytest.raises(InputError, match=r"different TRs, 1\.5, 2 s"):
        Subject.open(decoded, runs, wanted_rois(decoded))
