"""Runs from a plain table, for data that are in no BIDS tree.

Columns: subject, bold, and if at hand session, task, run, space, mask, confounds, events. Paths may be
relative to the table's own folder.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from raypipe.errors import InputError, MissingInput
from raypipe.read.bids import NATIVE, BidsQuery
from raypipe.read.runfiles import (
    RunFiles,
    bare,
    check_distinct,
    check_subjects,
    number_key,
    without_zeros,
)

_WORDS = ("session", "task", "run", "space")
_FILES = ("mask", "confounds", "events")
_PREFIX = {"subject": "sub", "session": "ses", "task": "task", "run": "run", "space": "space"}


def read_run_table(path: Path, subjects: Sequence[str] = ()) -> tuple[RunFiles, ...]:
    """The runs of ``subjects``, or of all, in the table's order within a subject.

    Raises MissingInput for an absent subject or file, InputError for a table that cannot be read so.
    """
    path = Path(path)
    rows = _rows(path)
    found = table_subjects(path)
    check_subjects(subjects, found, path)
    wanted = [bare(subject, "sub") for subject in subjects] or list(found)
    runs = [
        _run(row, line, path)
        for subject in wanted
        for line, row in rows
        if _subject_of(row) == subject
    ]
    check_distinct(runs, path)
    return tuple(runs)


def choose_runs(path: Path, subject: str, query: BidsQuery) -> tuple[RunFiles, ...]:
    """The runs of ``subject`` that ``query`` asks for, as ``bids.find_runs`` chooses in a tree.

    A row that says nothing of its space is native. Raises MissingInput, naming what the subject has.
    """
    every = read_run_table(path, (subject,))
    runs = tuple(run for run in every if _asked_for(run, query))
    if not runs:
        told = ", ".join(f"{run.name} (space {run.space or NATIVE})" for run in every[:8])
        raise MissingInput(
            f"subject {subject} has no run of that selection in {path}; it has: {told}"
        )
    return runs


def _asked_for(run: RunFiles, query: BidsQuery) -> bool:
    numbers = [without_zeros(bare(name, "run")) for name in query.runs]
    return (
        (not query.sessions or run.session in [bare(name, "ses") for name in query.sessions])
        and (not query.runs or without_zeros(run.run or "") in numbers)
        and (query.task is None or run.task == bare(query.task, "task"))
        and (query.space is None or (run.space or NATIVE) == bare(query.space, "space"))
    )


def table_subjects(path: Path) -> tuple[str, ...]:
    """The subjects that the table at ``path`` names; whether their files are there is not looked at.

    Raises MissingInput, and InputError for a row without subject or a table without rows.
    """
    rows = _rows(Path(path))
    if not rows:
        raise InputError(f"run table {path} has no rows; write one a run")
    for line, row in rows:
        if not _subject_of(row):
            raise InputError(f"{path} line {line} has no subject or no bold; every run needs both")
    return tuple(sorted({_subject_of(row) for _, row in rows}, key=number_key))


def _rows(path: Path) -> list[tuple[int, dict[str, str | None]]]:
    """(line, columns) of each row."""
    if not path.is_file():
        raise MissingInput(
            f"run table {path} does not exist; give a CSV or TSV with columns subject, bold"
        )
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"run table {path} is no text: {error}; give a CSV or TSV") from None
    _check_columns(columns, path)
    return list(enumerate(rows, start=2))


def _subject_of(row: dict[str, str | None]) -> str:
    return bare((row.get("subject") or "").strip(), "sub")


def _check_columns(columns: Sequence[str], path: Path) -> None:
    known = ("subject", "bold", *_WORDS, *_FILES)
    missing = [name for name in ("subject", "bold") if name not in columns]
    unknown = [name for name in columns if name not in known]
    if missing or unknown:
        told = f"has no column {missing[0]}" if missing else f"has a column {unknown[0]!r}"
        raise InputError(f"run table {path} {told}; columns are {', '.join(known)}")


def _run(row: dict[str, str | None], line: int, path: Path) -> RunFiles:
    def word(name: str) -> str | None:
        text = (row.get(name) or "").strip()
        return bare(text, _PREFIX.get(name, "")) if text and text != "n/a" else None

    def file(name: str) -> Path | None:
        text = word(name)
        if text is None:
            return None
        found = path.parent / text
        if not found.is_file():
            raise MissingInput(
                f"{path} line {line}: {name} {found} does not exist; correct the path"
            )
        return found

    subject, bold = word("subject"), file("bold")
    if subject is None or bold is None:
        raise InputError(f"{path} line {line} has no subject or no bold; every run needs both")
    return RunFiles(
        subject=subject,
        bold=bold,
        session=word("session"),
        task=word("task"),
        run=word("run"),
        space=word("space"),
        mask=file("mask"),
        confounds=file("confounds"),
        events=file("events"),
    )
