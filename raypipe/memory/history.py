"""Reads memory logs back: RUN/memory/*.csv as ``tracker`` writes them, torn lines left out."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import MissingInput, StoreCorrupt

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class History:
    """One process's log; all arrays are (n_rows,), NaN where a cell is empty.

    time_s : seconds since 1970, so that the processes of a run share one axis
    peak_bytes : the largest charge since the row before
    gpu_allocated_bytes, gpu_peak_bytes : device index -> this process's bytes
    """

    name: str
    time_s: Floats
    step: Floats
    phase: Sequence[str]
    charge_bytes: Floats
    peak_bytes: Floats
    file_bytes: Floats
    available_bytes: Floats
    budget_bytes: Floats
    gpu_allocated_bytes: Mapping[int, Floats]
    gpu_reserved_bytes: Mapping[int, Floats]
    gpu_peak_bytes: Mapping[int, Floats]

    @property
    def budget(self) -> int | None:
        """The budget in force at the end, in bytes; None where none was given."""
        given = self.budget_bytes[np.isfinite(self.budget_bytes)]
        return int(given[-1]) if given.size else None

    @property
    def at_peak(self) -> int:
        """The row that holds the largest charge."""
        return int(np.nanargmax(self.peak_bytes))


def read_history(path: Path) -> History:
    """The log at ``path``. Raises MissingInput; StoreCorrupt when it holds no row."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise MissingInput(f"{path} is not there; give a log that MemoryTracker wrote") from None
    lines = text[: text.rfind("\n") + 1].splitlines()
    header, *rows = list(csv.reader(lines)) or [[]]
    whole = [row for row in rows if len(row) == len(header) and _is_row(header, row)]
    if "charge_bytes" not in header or not whole:
        raise StoreCorrupt(f"{path} holds no row of a memory log; remove it and report again")
    columns = {name: [row[at] for row in whole] for at, name in enumerate(header)}

    def numbers(name: str) -> Floats:
        return np.array([float(cell) if cell else np.nan for cell in columns[name]], np.float64)

    def of_gpus(name: str) -> dict[int, Floats]:
        end = f"_{name}_bytes"
        names = [column for column in header if column.startswith("gpu") and column.endswith(end)]
        return {int(column[3 : -len(end)]): numbers(column) for column in names}

    return History(
        name=path.stem,
        time_s=numbers("time_s"),
        step=numbers("step"),
        phase=columns["phase"],
        charge_bytes=numbers("charge_bytes"),
        peak_bytes=numbers("charge_peak_bytes"),
        file_bytes=numbers("rss_file_bytes"),
        available_bytes=numbers("available_bytes"),
        budget_bytes=numbers("budget_bytes"),
        gpu_allocated_bytes=of_gpus("allocated"),
        gpu_reserved_bytes=of_gpus("reserved"),
        gpu_peak_bytes=of_gpus("peak"),
    )


def read_histories(folder: Path) -> list[History]:
    """All logs of a folder that hold a row, by name; none where there is no folder.

    A process that was killed before its first row leaves a header: that is no error here.
    """
    found = []
    for path in sorted(folder.glob("*.csv")):
        if path.read_bytes().count(b"\n") > 1:
            found.append(read_history(path))
    return found


def _is_row(header: Sequence[str], row: Sequence[str]) -> bool:
    """A torn line that was continued may have the right number of cells and still be nonsense."""
    try:
        for name, cell in zip(header, row, strict=True):
            if name != "phase" and cell:
                float(cell)
    except ValueError:
        return False
    return bool(row[header.index("time_s")]) if "time_s" in header else False
