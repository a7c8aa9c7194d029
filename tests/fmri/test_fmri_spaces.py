"""Which space a table's rows are of: an empty word is native, for the command and for the loader."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from run_kit import roi_config

from raypipe import MemoryEfficientLoader
from raypipe.cli import main
from raypipe.errors import InputError, MissingInput
from raypipe.fmri.inputs import runs_of
from raypipe.read.bids import BidsQuery
from raypipe.read.runtable import choose_runs

pytestmark = pytest.mark.usefixtures("no_page")


def with_spaces(table: Path, spaces: list[str]) -> Path:
    """The table with a column space, its rows in turn of ``spaces``."""
    rows = list(csv.DictReader(table.open(newline="")))
    for number, row in enumerate(rows):
        row["space"] = spaces[number % len(spaces)]
    path = table.with_name("spaces.csv")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("spaces", [None, [""], ["n/a"]])
def test_rows_that_tell_no_space_are_native(table: Path, spaces: list[str] | None) -> None:
    path = table if spaces is None else with_spaces(table, spaces)
    every = choose_runs(path, "01", BidsQuery())
    assert len(every) == 3
    assert choose_runs(path, "01", BidsQuery(space="native")) == every
    assert (
        runs_of(roi_config(path, path.parent / "run", query=BidsQuery(space="native")), "01")
        == every
    )
    with pytest.raises(MissingInput, match=r"it has: sub-01 run-1 \(space native\), sub-01 run-2"):
        choose_runs(path, "01", BidsQuery(space="MNI152"))


def test_a_table_of_two_spaces_is_chosen_from(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_spaces(table, ["MNI152", ""])
    flags = ["fmri", "roi", "--table", str(path), "--run-dir", str(tmp_path / "run")]
    flags += ["--roi", f"yes={table.parent}/rois/yes.nii.gz", "--runner", "local"]
    flags += ["--cache-dir", str(tmp_path / "cache")]
    assert main(flags) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "subjects differ in space: MNI152, native; choose one by --space" in said
    assert main([*flags, "--space", "native"]) == 0
    series = {path.name for path in (tmp_path / "run" / "series").iterdir()}
    assert series == {
        "sub-01_run-2_roi-yes.npy", "sub-02_run-1_roi-yes.npy", "sub-02_run-3_roi-yes.npy",
    }  # fmt: skip


def test_one_run_in_two_spaces_is_told_as_that(table: Path, tmp_path: Path) -> None:
    rows = table.read_text().splitlines()
    head, first = rows[0], rows[1]
    other = first.replace("run-1_bold", "run-2_bold")  # another file: one file twice is refused
    text = "\n".join([f"{head},space", f"{first},MNI152", f"{other},"]) + "\n"
    path = table.with_name("twice.csv")
    path.write_text(text)
    with pytest.raises(InputError, match="sub-01_run-1 is there in spaces MNI152, native; choose"):
        main_of(path, tmp_path)


def main_of(path: Path, tmp_path: Path) -> None:
    from raypipe.fmri.commands import roi
    from raypipe.runner import LocalRunner

    roi(roi_config(path, tmp_path / "run"), LocalRunner())


def test_the_loader_chooses_from_a_table_too(table: Path, tmp_path: Path) -> None:
    path = with_spaces(table, ["MNI152", "", "MNI152"])
    query = BidsQuery(space="native")
    with MemoryEfficientLoader(path, query=query, cache_dir=tmp_path / "cache") as loader:
        assert [run.run for run in loader.runs("01")] == ["2"]
