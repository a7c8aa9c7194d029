"""A searchlight on Ray makes the maps of one process; a killed worker loses one block and no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from real_kills import killing
from run_kit import make_data

from raypipe.cluster.runner import RayRunner
from raypipe.fmri.searchlight.job import SearchlightJobConfig
from raypipe.fmri.searchlight.run import run_searchlight
from raypipe.runner import LocalRunner

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session", "no_page")]


def blocks(run_dir: Path) -> dict[Path, int]:
    """Block -> when it was written."""
    return {path: path.stat().st_mtime_ns for path in run_dir.glob("blocks/*/*.npz")}


def test_a_killed_worker_loses_the_block_under_way_and_no_other(tmp_path: Path) -> None:
    here = SearchlightJobConfig(
        table=make_data(tmp_path / "data"),
        run_dir=tmp_path / "here",
        cache_dir=tmp_path / "cache",
        delay_s=0.0,
        each="trial",
        radius_mm=3.5,
        centres_a_block=40,
    )
    run_searchlight(here, LocalRunner())
    there = replace(here, run_dir=tmp_path / "there", cache_dir=tmp_path / "other", workers=2)
    events: list[str] = []
    runner = RayRunner(joined=False, on_event=events.append)
    with killing(lambda: blocks(there.run_dir)) as killed:
        found = run_searchlight(there, runner)
    assert 0 < len(killed.before) < 8, "the kill must fall inside the run, or nothing was shown"
    assert any(f"worker {killed.pid} failed" in event for event in events)
    assert (found.units, found.computed, found.failed) == (2, 2, {})
    after = blocks(there.run_dir)
    assert len(after) == 8
    for path, at in killed.before.items():
        assert after[path] == at, f"{path.name} was finished, and computed again"
    for path in sorted((here.run_dir / "maps").glob("*.nii.gz")):
        ours = np.asarray(nibabel.load(there.run_dir / "maps" / path.name).dataobj)
        np.testing.assert_array_equal(ours, np.asarray(nibabel.load(path).dataobj))
    again = run_searchlight(there, runner)
    assert (again.computed, again.found, again.blocks) == (0, 2, 0)
