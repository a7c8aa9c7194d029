"""Betas on Ray are those of one process; a killed worker loses the run under way and no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from real_kills import killing
from run_kit import N_RUNS, make_data

from raypipe.cluster.runner import RayRunner
from raypipe.fmri.glm.job import BetasConfig
from raypipe.fmri.glm.run import betas
from raypipe.runner import LocalRunner

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session", "no_page")]

SUBJECTS = ("01", "02", "03", "04")


def records(run_dir: Path) -> dict[Path, int]:
    """Record of a unit -> when it was written."""
    return {path: path.stat().st_mtime_ns for path in run_dir.glob("units/*.json")}


def test_a_killed_worker_loses_the_run_under_way_and_no_other(tmp_path: Path) -> None:
    here = BetasConfig(
        table=make_data(tmp_path / "data", SUBJECTS),
        run_dir=tmp_path / "here",
        cache_dir=tmp_path / "cache",
        hrf="spm + derivative",
    )
    betas(here, LocalRunner())
    there = replace(here, run_dir=tmp_path / "there", cache_dir=tmp_path / "other", workers=2)
    events: list[str] = []
    runner = RayRunner(joined=False, on_event=events.append)
    with killing(lambda: records(there.run_dir)) as killed:
        found = betas(there, runner)
    n_units = len(SUBJECTS) * N_RUNS
    assert 0 < len(killed.before) < n_units, (
        "the kill must fall inside the run, or nothing was shown"
    )
    assert any(f"worker {killed.pid} failed" in event for event in events)
    assert (found.units, found.computed, found.failed) == (n_units, n_units, {})
    after = records(there.run_dir)
    assert len(after) == n_units
    for path, at in killed.before.items():
        assert after[path] == at, f"{path.name} was finished, and fitted again"
    for path in sorted((here.run_dir / "betas").glob("*.nii.gz")):
        ours = np.asarray(nibabel.load(there.run_dir / "betas" / path.name).dataobj)
        np.testing.assert_array_equal(ours, np.asarray(nibabel.load(path).dataobj))
    table = (there.run_dir / "betas_roi-brain.csv").read_text()
    assert table == (here.run_dir / "betas_roi-brain.csv").read_text()
    assert not list(there.run_dir.rglob("*.tmp"))
    again = betas(there, runner)
    assert (again.computed, again.found) == (0, n_units)
