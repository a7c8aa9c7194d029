"""What a run folder says: its units' records, the group's rows, permuted scores, maps. Read only.

A run folder may hold units of earlier options (other ROIs, other targets): run.json names those of
the run, in their order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import StoreCorrupt
from raypipe.fmri.ledger import DONE, Ledger
from raypipe.report.saved import read_json, read_run

Floats = NDArray[np.float64]
Record = Mapping[str, Any]

_DRAWS = (
    20_000  # combinations of subjects' permutations: the band's edges are sure to 1 % of its width
)
#: Which score a page shows first, of those a target has.
FIRST = ("accuracy", "balanced_accuracy", "roc_auc", "r", "r2")
NAMES = {
    "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "roc_auc": "area under the ROC",
    "r": "Pearson r", "r2": "R²",
}  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class Results:
    """A run. units : records that are done, of this run; group : rows of group.json; failed : unit -> why."""

    run_dir: Path
    run: Record
    units: Sequence[Record]
    group: Sequence[Record]
    failed: Mapping[str, str]

    @property
    def targets(self) -> tuple[str, ...]:
        """Targets in the order of the records; "" of time series is none."""
        return tuple(dict.fromkeys(u["target"] for u in self.units if u["target"]))

    def first_score(self, target: str) -> str:
        """The score that ``target`` is shown by."""
        has = {name for unit in self.of(target) for name in unit["scores"]}
        return next((name for name in FIRST if name in has), next(iter(sorted(has)), ""))

    def of(self, target: str) -> list[Record]:
        """The units of ``target``."""
        return [unit for unit in self.units if unit["target"] == target]

    def others_files(self) -> set[Path]:
        """Files of units that are in the folder and not of this run."""
        own = {unit["unit"] for unit in self.units}
        records = [record for record in Ledger(self.run_dir).all() if record["unit"] not in own]
        return {self.run_dir / name for record in records for name in record["files"]}

    def row(self, roi: str, target: str, score: str) -> Record | None:
        """The group's row, if the group was tested."""
        wanted = (roi, target, score)
        return next((r for r in self.group if (r["roi"], r["target"], r["score"]) == wanted), None)


def read_results(run_dir: Path) -> Results:
    """Everything that a page needs but permuted scores. Raises MissingInput, StoreCorrupt."""
    run = read_run(run_dir)
    group: Sequence[Record] = ()
    if (run_dir / "group.json").is_file():
        group = read_json(run_dir / "group.json", "run the command again")["rows"]
    records = [record for record in Ledger(run_dir).all() if record["status"] == DONE]
    named = run.get("units")
    if named is not None:
        order = {name: number for number, name in enumerate(named)}
        records = [record for record in records if record["unit"] in order]
        records.sort(key=lambda record: order[record["unit"]])
    failed = {
        name: str(found[0])
        for name, found in ((run.get("summary") or {}).get("failed") or {}).items()
    }
    return Results(run_dir=run_dir, run=run, units=records, group=group, failed=failed)


def permuted(results: Results, unit: Record, score: str) -> Floats:
    """(n_permutations,) scores of permuted labels of one unit; none where none were made."""
    from pyarrow.parquet import read_table

    path = results.run_dir / "units" / f"{unit['unit']}.parquet"
    if unit.get("p", {}).get(score) is None or not path.is_file():
        return np.empty(0)
    try:
        table = read_table(path, filters=[("kind", "=", "null"), ("score", "=", score)])
    except (OSError, ValueError) as error:
        raise StoreCorrupt(f"{path} cannot be read ({error}); remove it, run again") from error
    order = np.argsort(table["index"].to_numpy())
    values: Floats = table["value"].to_numpy()[order].astype(np.float64)
    return values


@dataclass(frozen=True, eq=False, kw_only=True)
class RoiScores:
    """One ROI for one target and score.

    subjects, values, p : (n_subjects,), p NaN without permutations
    band : of the subjects' mean under permuted labels, 2.5 and 97.5 percent; None without
    q : false discovery rate of the group's t test; NaN where it was not tested
    """

    roi: str
    subjects: tuple[str, ...]
    values: Floats
    p: Floats
    chance: float
    band: tuple[float, float] | None
    q: float
    row: Record | None

    @property
    def mean(self) -> float:
        """Mean over subjects."""
        return float(np.nanmean(self.values)) if self.values.size else math.nan


def roi_scores(results: Results, target: str, score: str) -> list[RoiScores]:
    """Every ROI of ``target`` in the order of its records; subjects in the order of theirs."""
    by_roi: dict[str, list[Record]] = {}
    for unit in results.of(target):
        if unit["scores"].get(score) is not None:
            by_roi.setdefault(unit["roi"], []).append(unit)
    return [_of_roi(results, roi, target, score, units) for roi, units in by_roi.items()]


def _of_roi(
    results: Results, roi: str, target: str, score: str, units: Sequence[Record]
) -> RoiScores:
    row = results.row(roi, target, score)
    q = None if row is None else row.get("q")
    return RoiScores(
        roi=roi,
        subjects=tuple(str(unit["subject"]) for unit in units),
        values=np.array([unit["scores"][score] for unit in units], np.float64),
        p=np.array([_number((unit.get("p") or {}).get(score)) for unit in units]),
        chance=float(np.mean([unit["chance"][score] for unit in units])),
        band=mean_band([permuted(results, unit, score) for unit in units]),
        q=_number(q),
        row=row,
    )


def mean_band(nulls: Sequence[Floats]) -> tuple[float, float] | None:
    """2.5 and 97.5 percent of the subjects' mean, each subject's permutation drawn by itself.

    Permutation i must not be taken of all subjects at once: where they share a design and the run's
    seed it is the same permutation of the same labels, near the true ones in all of them or in none,
    and their mean would spread too much (Stelzer 2013 draws as here). None when a subject has none.
    """
    known = [null[np.isfinite(null)] for null in nulls]
    if not known or not all(null.size for null in known):
        return None
    rng = np.random.default_rng(0)  # the same page from the same records
    means = known[0]
    if len(known) > 1:
        drawn = (null[rng.integers(null.size, size=_DRAWS)] for null in known)
        means = sum(drawn, np.zeros(_DRAWS)) / len(known)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
