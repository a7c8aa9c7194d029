"""Trial types of events.tsv are text as it is written, whatever pandas would make of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from raypipe.errors import InputError
from raypipe.read.events import read_events


def _table(folder: Path, *rows: str) -> Path:
    path = folder / "events.tsv"
    path.write_text("\n".join(["onset\tduration\ttrial_type", *rows]) + "\n")
    return path


def test_numeric_trial_types_are_the_same_with_and_without_a_gap(tmp_path: Path) -> None:
    whole = read_events(_table(tmp_path, "0\t1\t1", "2\t1\t2"))
    assert whole.trial_type.tolist() == ["1", "2"]
    gap = read_events(_table(tmp_path, "0\t1\t1", "2\t1\t2", "4\t1\tn/a"))
    assert gap.trial_type.tolist() == ["1", "2"]
    assert read_events(_table(tmp_path, "0\t1\t01")).trial_type.tolist() == ["01"]


def test_only_bids_own_words_are_missing(tmp_path: Path) -> None:
    kinds = ["null", "None", "NA", "n/a", "", "nan"]
    rows = [f"{2 * index}\t1\t{kind}" for index, kind in enumerate(kinds)]
    assert read_events(_table(tmp_path, *rows)).trial_type.tolist() == ["null", "None", "NA"]


@pytest.mark.parametrize("row", ["soon\t1\tface", "1\tlong\tface", "NA\t1\tface"])
def test_a_time_that_is_no_number_is_told(tmp_path: Path, row: str) -> None:
    with pytest.raises(InputError, match="no number, missing or negative"):
        read_events(_table(tmp_path, "0\t1\tface", row))
