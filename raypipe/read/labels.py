"""A plain table of one label a volume, as PyMVPA's attributes.txt: label, and the run it was measured in.

Words divided by blanks, tabs or commas; with a header, or with none and then label, run in that order.
Labels of events instead of volumes are ``events.py``.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import InputError, MissingInput, UnknownName

LABEL_NAMES = ("label", "labels", "trial_type", "condition")
RUN_NAMES = ("run", "runs", "chunk", "chunks")


@dataclass(frozen=True, eq=False, kw_only=True)
class VolumeLabels:
    """labels : (T,) str; runs : (T,) str, the run of each volume as the table calls it.

    onsets : (T,) seconds of the column onset, NaN where it has no number; None where there is none
    """

    labels: NDArray[np.str_]
    runs: NDArray[np.str_]
    onsets: NDArray[np.float64] | None = None


def read_labels(path: Path, column: str | None = None) -> VolumeLabels:
    """The labels in ``column`` (by default the first of LABEL_NAMES that is there).

    Without a run column all volumes are of one run. Raises MissingInput, InputError, UnknownName.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingInput(f"labels {path} do not exist; give a table of one row a volume")
    header, rows = _table(path, column)
    at = _place(header, (column,) if column else LABEL_NAMES, path)
    if at is None:
        raise UnknownName.of("label column", column or "label", header, f"in {path}")
    run_at = _place(header, RUN_NAMES, path)
    labels = np.array([row[at] for row in rows], dtype=np.str_)
    runs = [row[run_at] for row in rows] if run_at is not None else ["1"] * len(rows)
    names = np.array(runs, dtype=np.str_)
    onset_at = _place(header, ("onset",), path)
    onsets = None if onset_at is None else np.array([_seconds(row[onset_at]) for row in rows])
    return VolumeLabels(labels=labels, runs=names, onsets=onsets)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _table(path: Path, column: str | None) -> tuple[list[str], list[list[str]]]:
    """(column names, rows of equal length)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"labels {path} are no text: {error}; give a table") from None
    mark = "\t" if "\t" in text else "," if "," in text else None
    lines = [line for line in text.splitlines() if line.strip()]
    rows = [
        [word.strip() for word in next(csv.reader([line], delimiter=mark))]
        if mark
        else line.split()
        for line in lines
    ]
    if not rows:
        raise InputError(f"labels {path} have no row; give one a volume")
    known = {*LABEL_NAMES, *RUN_NAMES, *([column] if column else [])}
    header = rows.pop(0) if known & set(rows[0]) else ["label", "run"][: len(rows[0])]
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise InputError(
                f"labels {path}: row {number} has {len(row)} words, the columns are "
                f"{', '.join(header)}; correct the row"
            )
    return header, rows


def _place(header: Sequence[str], names: Sequence[str], path: Path) -> int | None:
    """Where the first of ``names`` stands; InputError when it stands there twice."""
    for name in names:
        if header.count(name) > 1:
            raise InputError(f"labels {path} have two columns {name}; rename one")
        if name in header:
            return list(header).index(name)
    return None
