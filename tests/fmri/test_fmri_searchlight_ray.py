"""A searchlight on Ray gives, block by block, what one process gives; nothing is computed twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from run_kit import make_data

from raypipe.cluster.runner import RayRunner
from raypipe.fmri.searchlight.job import SearchlightJobConfig
from raypipe.fmri.searchlight.run import run_searchlight
from raypipe.runner import LocalRunner

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session", "no_page")]


def test_two_workers_make_the_maps_of_one_process(
    tmp_path: Path,
) -> None:
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
    runner = RayRunner(joined=False, on_event=lambda text: None)
    found = run_searchlight(there, runner)
    assert (found.units, found.computed, found.blocks, found.failed) == (2, 2, 8, {})
    for path in sorted((here.run_dir / "maps").glob("*.nii.gz")):
        ours = np.asarray(nibabel.load(there.run_dir / "maps" / path.name).dataobj)
        np.testing.assert_array_equal(ours, np.asarray(nibabel.load(path).dataobj))
    (there.run_dir / "maps" / "sub-01_roi-brain_target-all_accuracy_searchlight.nii.gz").unlink()
    again = run_searchlight(there, runner)
    assert (again.computed, again.found, again.blocks) == (1, 1, 0)
