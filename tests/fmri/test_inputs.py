"""Inputs of subjects put together: what must be alike, and what a unit's key depends on."""

from __future__ import annotations

from pathlib import Path

import pytest

from raypipe.errors import InputError
from raypipe.fmri.config import RoiConfig
from raypipe.fmri.inputs import SubjectInputs, check_alike
from raypipe.read.runfiles import RunFiles


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
