"""The files of one fMRI run, and how runs are chosen and missing ones told.

Finding them in an fMRIPrep tree is ``bids.py``, in a plain table ``runtable.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raypipe.errors import InputError, MissingInput


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """One run of one subject; entities without their prefix ("01", not "sub-01"), None where absent."""

    subject: str
    bold: Path
    session: str | None = None
    task: str | None = None
    run: str | None = None
    space: str | None = None
    mask: Path | None = None
    confounds: Path | None = None
    events: Path | None = None

    @property
    def name(self) -> str:
        """The run in words for messages, e.g. ``sub-01 ses-2 task-rest run-1``."""
        pairs = (("ses", self.session), ("task", self.task), ("run", self.run))
        return " ".join(
            [f"sub-{self.subject}", *(f"{key}-{value}" for key, value in pairs if value)]
        )


def bare(value: str, entity: str) -> str:
    """``value`` without its prefix: "sub-01" and "01" are one subject."""
    return value.removeprefix(f"{entity}-")


def without_zeros(number: str) -> str:
    """Run 01 is the same as 1."""
    return number.lstrip("0") or number


def check_subjects(wanted: Sequence[str], found: Sequence[str], where: Path) -> None:
    """Raises MissingInput, naming those that are there, when a wanted subject is not."""
    missing = [subject for subject in wanted if bare(subject, "sub") not in found]
    if missing:
        raise MissingInput(
            f"subject {', '.join(missing)} is not in {where}; found: {', '.join(found) or 'none'}"
        )


def number_key(text: str | None) -> tuple[int, str]:
    """Sorts "2" before "10", and words after numbers."""
    return (int(text), "") if text is not None and text.isdigit() else (1 << 30, text or "")


def check_distinct(runs: Sequence[RunFiles], where: Path) -> None:
    """Raises InputError when one scan is listed twice."""
    seen: dict[Path, RunFiles] = {}
    for run in runs:
        if run.bold in seen:
            raise InputError(
                f"{where} names {run.bold} twice, for {seen[run.bold].name} and {run.name}"
            )
        seen[run.bold] = run
