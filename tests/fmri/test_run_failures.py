"""What cannot be used ends its own units, in one line each, and no others; exit codes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from run_kit import (
    AFFINE,
    SHAPE,
    flags,
    make_data,
    mvpa_config,
    record,
    roi_config,
    run,
    written,
)

from raypipe.cli import main
from raypipe.errors import InputError
from raypipe.fmri.commands import roi
from raypipe.read.bids import BidsQuery
from raypipe.runner import LocalRunner

pytestmark = pytest.mark.usefixtures("no_page")


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
    assert len(said) == 3, "what is wrong with a whole subject is said once"
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
    cfg = mvpa_config(table, tmp_path / "run", query=BidsQuery(subjects=("09",)))
    with pytest.raises(InputError, match=r"subject 09 is not in .*found: 01, 02"):
        run(cfg)
    for scan in table.parent.glob("sub-*bold.nii.gz"):
        scan.rename(scan.with_suffix(".away"))
    with pytest.raises(
        InputError, match=r"none of 4 units can be computed: .*bold.nii.gz does not"
    ):
        run(replace(cfg, query=BidsQuery()))
    assert not cfg.run_dir.exists()


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
