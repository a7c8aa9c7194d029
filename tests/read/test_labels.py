"""Tables of one label a volume, as people have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from raypipe.errors import InputError, MissingInput, UnknownName
from raypipe.read.labels import read_labels


@pytest.mark.parametrize(
    "text",
    [
        "labels chunks\nrest 0\nface 0\nface 1\n",
        "rest 0\nface 0\nface 1\n\n",
        "run,label\n0,rest\n0,face\n1,face\n",
        "label\trun\tother\nrest\t0\tx y\nface\t0\t\nface\t1\tz\n",
    ],
)
def test_labels_and_runs_are_found(tmp_path: Path, text: str) -> None:
    path = tmp_path / "labels.txt"
    path.write_text(text)
    found = read_labels(path)
    assert found.labels.tolist() == ["rest", "face", "face"]
    assert found.runs.tolist() == ["0", "0", "1"]


def test_a_column_may_be_named_and_runs_may_be_absent(tmp_path: Path) -> None:
    path = tmp_path / "labels.tsv"
    path.write_text("rating\tlabel\n1.5\ta\nn/a\tb\n")
    assert read_labels(path, "rating").labels.tolist() == ["1.5", "n/a"]
    assert read_labels(path).runs.tolist() == ["1", "1"]
    with pytest.raises(UnknownName, match="unknown label column 'ratings'; nearest: rating"):
        read_labels(path, "ratings")


def test_tables_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInput):
        read_labels(tmp_path / "none.txt")
    for text, words in (
        ("", "have no row"),
        ("label run\na 1\nb\n", "row 2 has 1 words"),
        ("label label\na b\n", "two columns label"),
    ):
        path = tmp_path / "bad.txt"
        path.write_text(text)
        with pytest.raises(InputError, match=words):
            read_labels(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="are no text"):
        read_labels(path)
