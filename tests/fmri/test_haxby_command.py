"""Real fMRI by the command line: faces from houses, eight categories, and permuted labels at chance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from raypipe.cli import main


@pytest.mark.slow
def test_haxby_by_the_command_line(
    real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    haxby = real_data / "haxby"
    if not haxby.is_dir():
        pytest.skip(f"real fMRI is not at {haxby}; set RAYPIPE_REAL_DATA")
    table = tmp_path / "runs.csv"
    table.write_text(f"subject,bold,mask\n1,{haxby}/bold.nii.gz,{haxby}/mask.nii.gz\n")
    flags = [
        *("fmri", "mvpa", "--table", str(table), "--runner", "local"),
        *("--labels", f"{haxby}/attributes_literal.txt", "--delay-s", "0"),
        *("--cache-dir", str(tmp_path / "cache"), "--scores", "accuracy"),
    ]
    run_dir = tmp_path / "run"
    both = ["--target", "all", "face,house", "--run-dir", str(run_dir)]
    assert main([*flags, *both, "--n-permutations", "20"]) == 0
    assert "brain face-house accuracy: 0.9" in capsys.readouterr().out
    name = "units/sub-1_roi-brain_target-{}.json"
    told = {
        target: json.loads((run_dir / name.format(target)).read_text())
        for target in ("all", "face-house")
    }
    assert told["face-house"]["scores"]["accuracy"] >= 0.97
    assert told["all"]["scores"]["accuracy"] >= 0.58  # chance 0.125
    assert len(told["all"]["folds"]["accuracy"]) == 12
    assert told["all"]["n_samples"] == 864
    assert told["all"]["n_voxels"] == 530
    assert abs(told["all"]["null"]["accuracy"]["median"] - 0.125) < 0.03
    assert np.array(told["all"]["confusion"]).shape == (8, 8)
