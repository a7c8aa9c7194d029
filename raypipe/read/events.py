"""events.tsv -> onsets, durations and trial types of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from raypipe.errors import InputError, MissingInput

_MISSING = ["n/a", "", "nan", "NaN"]  # None, null and NA can be names of trial types


@dataclass(frozen=True, eq=False, kw_only=True)
class Events:
    """A run's events by onset. onset_s, duration_s : (n,) float64; trial_type : (n,) str."""

    onset_s: NDArray[np.float64]
    duration_s: NDArray[np.float64]
    trial_type: NDArray[np.str_]


def read_events(path: Path, column: str = "trial_type") -> Events:
    """The events in a BIDS events.tsv, their kind taken from ``column``."""
    path = Path(path)
    if not path.is_file():
        raise MissingInput(f"events {path} do not exist; give the run's events.tsv")
    try:
        table = pd.read_csv(
            path,
            sep="\t" if path.suffix == ".tsv" else ",",
            dtype={column: str},  # as they are written: guessed, 1 becomes 1.0 beside an n/a
            keep_default_na=False,
            na_values=_MISSING,
        )
    except ValueError as error:
        raise InputError(f"events {path} are not a readable table: {error}") from error
    for name in ("onset", "duration", column):
        if name not in table:
            raise InputError(
                f"events {path} have no column {name}; there are {', '.join(table.columns)}"
            )
    for name in ("onset", "duration"):
        table[name] = pd.to_numeric(table[name], errors="coerce")
    table = table[table[column].notna()].sort_values("onset", kind="stable")
    times = table[["onset", "duration"]].to_numpy(np.float64)
    if not np.isfinite(times).all() or (times[:, 1] < 0).any():
        raise InputError(
            f"events {path} hold an onset or duration that is no number, missing or negative; correct it"
        )
    return Events(
        onset_s=times[:, 0].copy(),
        duration_s=times[:, 1].copy(),
        trial_type=table[column].astype(str).to_numpy(dtype=np.str_),
    )
