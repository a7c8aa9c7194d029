"""Which valid rows train and which choose the epoch, and the file that keeps it.

Rows whose image could not be read are in no split. Up to `LISTED_ROWS` rows, and wherever one is
invalid, both parts are arrays: 8 bytes a row in a task, 8 more in a worker's plan. Above, they are
computed from a few numbers (`raypipe.stream.split`), and split.json holds these. Which of the two
depends on the valid rows alone, so that a resumed run finds the rule that it began with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import ConfigError, InputError, StoreCorrupt
from raypipe.report.saved import read_json, write_json
from raypipe.store.schema import names_digest
from raypipe.stream import KeyedPermutation, SplitRows, split_rows

Rows: TypeAlias = NDArray[np.int64] | SplitRows

#: Most rows that are listed: 8 MiB of them. Runs of more rows are younger than this rule.
LISTED_ROWS = 2**20
_REFIT = "it is written by encode fit: fit this run again"


@dataclass(frozen=True, eq=False, kw_only=True)
class Split:
    """Which valid rows train, and which choose the epoch; both (n,) int64, sorted, disjoint."""

    train: Rows
    val: Rows
    fraction: float
    seed: int

    def as_dict(self, names: Sequence[str]) -> dict[str, object]:
        """For split.json; names : file name of every row."""
        said = {"seed": self.seed, "val_fraction": self.fraction, "n_rows": len(names)}
        if isinstance(self.val, SplitRows):
            return said | {
                "rule": "a row of each stretch of neighbours is drawn by the seed",
                "n_val": len(self.val),
                "val_digest": self.val.digest(),
                "names_digest": names_digest(names),
            }
        return said | {
            "train_rows": np.asarray(self.train).tolist(),
            "val_rows": self.val.tolist(),
            "val_names": [names[row] for row in self.val],
        }


def seeded_split(valid: NDArray[np.bool_], fraction: float, seed: int) -> Split:
    """Hold out ``fraction`` of the valid rows, at least 2 (one row has no correlation).

    A function of (valid, fraction, seed) only, the same on every machine. Raises InputError when
    too few rows are left.
    """
    n = int(np.count_nonzero(valid))
    n_val = max(2, round(fraction * n))
    if n - n_val < 1:
        raise InputError(
            f"{n} valid images are too few to hold out {n_val} and train on the rest;"
            " extract more images, or mend those marked invalid"
        )
    computed = n == len(valid) > LISTED_ROWS
    train, val = split_rows(n, n_val, seed) if computed else _listed(valid, n_val, seed)
    return Split(train=train, val=val, fraction=fraction, seed=seed)


def _listed(valid: NDArray[np.bool_], n_val: int, seed: int) -> tuple[Rows, Rows]:
    """(train, val): the first ``n_val`` of the valid rows' shuffle are held out."""
    rows = np.flatnonzero(valid).astype(np.int64)
    order = KeyedPermutation(len(rows), (seed,))(np.arange(len(rows)))
    held = np.zeros(len(rows), bool)
    held[order[:n_val]] = True
    return rows[~held], rows[held]


def save_split(split: Split, names: Sequence[str], path: Path) -> None:
    """Write split.json; one that is there must say the same. Raises ConfigError."""
    fields = split.as_dict(names)
    if path.is_file() and read_json(path, "delete it") != fields:
        raise ConfigError(
            f"{path} divides the images in another way (other seed, fraction or images, or an earlier"
            f" raypipe's list of more than {LISTED_ROWS} rows); a resumed run must keep its split:"
            " use a new run folder, or --no-resume"
        )
    write_json(path, fields)


def load_split(path: Path) -> Split:
    """The split of a run. Raises MissingInput, StoreCorrupt."""
    fields = read_json(path, _REFIT)
    train: Rows
    val: Rows
    if "n_val" in fields:
        train, val = _computed(path, fields)
    else:
        train, val = (np.array(fields[f"{part}_rows"], np.int64) for part in ("train", "val"))
    return Split(train=train, val=val, fraction=fields["val_fraction"], seed=fields["seed"])


def _computed(path: Path, fields: Mapping[str, Any]) -> tuple[SplitRows, SplitRows]:
    train, val = split_rows(fields["n_rows"], fields["n_val"], fields["seed"])
    if val.digest() != fields["val_digest"]:
        raise StoreCorrupt(
            f"{path}: its {fields['n_val']} validation rows were drawn in another way than this raypipe"
            " draws; use the raypipe of that run, or fit this run again"
        )
    return train, val


def same_images(path: Path, names: Sequence[str]) -> bool:
    """Whether images of these ``names`` are those that the run's split.json was made of, as far as it
    tells: it lists the validation images, or has a digest of all. Raises as `load_split`.
    """
    fields = read_json(path, _REFIT)
    if "n_val" in fields:
        return fields["names_digest"] == names_digest(names)
    return fields["val_names"] == [names[row] for row in fields["val_rows"]]
