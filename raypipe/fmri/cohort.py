"""All subjects together: for each ROI and target, is the score above chance in the population?

From the units' records; the tests themselves are ``group``. Subjects differ in chance (classes are not
always as frequent), so what is tested is each subject's score less its own chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe.fmri.group import false_discovery_rate, least_p, one_sample_t, sign_flip
from raypipe.fmri.ledger import write_whole
from raypipe.report.saved import write_json

LEAST = 2  # subjects for a test
_SMALL, _SIGNIFICANT = 0.01, 0.05  # p values
_AGREE = 1e-6  # scores that differ less are the same


def group_rows(records: Sequence[Mapping[str, Any]], *, seed: int = 0) -> list[dict[str, Any]]:
    """A row for each (roi, target, score) of the records of done units, in their order.

    t, p : one-sided, score above chance; p_flip : by sign flips, p_flip_least the smallest that so many
    subjects can give; q, q_flip : false discovery rate over the rows of one score. NaN where fewer than
    two subjects have the score. Where all subjects agree there is no t (NaN), and p is that by sign flips.
    """
    groups: dict[tuple[str, str, str], list[tuple[str, float, float]]] = {}
    for record in records:
        for score, value in record["scores"].items():
            if value is not None:
                key = (record["roi"], record["target"], score)
                one = (record["subject"], float(value), float(record["chance"][score]))
                groups.setdefault(key, []).append(one)
    rows = [_row(*key, values, seed) for key, values in groups.items()]
    for score in {row["score"] for row in rows}:
        own = [row for row in rows if row["score"] == score]
        for p, q in (("p", "q"), ("p_flip", "q_flip")):
            adjusted = false_discovery_rate([row[p] for row in own])
            for row, value in zip(own, adjusted, strict=True):
                row[q] = float(value)
    return rows


def at_best(n_subjects: int) -> str:
    """A sentence for the page where few subjects, by few sign patterns, keep p from being small."""
    if n_subjects < LEAST or (p := least_p(n_subjects)) < _SMALL:
        return ""
    never = "" if p < _SIGNIFICANT else ", which is not below 0.05 whatever the data"
    return f" Sign flips of {n_subjects} subjects give p = {p:.2g} at best{never}."


def _row(
    roi: str, target: str, score: str, values: Sequence[tuple[str, float, float]], seed: int
) -> dict[str, Any]:
    scores = np.array([value for _, value, _ in values])
    chances = np.array([chance for _, _, chance in values])
    row: dict[str, Any] = {
        "roi": roi,
        "target": target,
        "score": score,
        "n_subjects": len(values),
        "mean": float(scores.mean()),
        "sd": float(scores.std(ddof=1)) if len(values) > 1 else math.nan,
        "chance": float(chances.mean()),
        "t": math.nan,
        "p": math.nan,
        "p_flip": math.nan,
        "p_flip_least": math.nan,
        "subjects": {subject: value for subject, value, _ in values},
    }
    if len(values) < LEAST:
        return row
    row["p_flip_least"] = least_p(len(values))
    above = scores - chances
    if above.std() < _AGREE:
        # Coarse scores can agree to the digit: t divides by what rounding leaves, and its p would be 0.
        same = np.full(
            len(above), np.sign(round(float(above.mean()), 6))
        )  # flips are free of scale
        p = float(sign_flip(same, seed=seed).p[0])
        return row | {"p": p, "p_flip": p}
    student, flipped = one_sample_t(above), sign_flip(above, seed=seed)
    return row | {
        "t": float(student.t[0]),
        "p": float(student.p[0]),
        "p_flip": float(flipped.p[0]),
    }


def save_group(run_dir: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """group.json, where what is undefined is null, and group.parquet, a row a subject left out."""
    shown = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        for row in rows
    ]
    write_json(run_dir / "group.json", {"rows": shown})
    flat = [{k: v for k, v in row.items() if k != "subjects"} for row in rows]
    write_whole(
        run_dir / "group.parquet", lambda file: pq.write_table(pa.Table.from_pylist(flat), file)
    )


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """For people: one line a row."""
    told = []
    for row in rows:
        text = f"{row['roi']} {row['target']} {row['score']}: {row['mean']:.3f}"
        text += f" (chance {row['chance']:.3f}, {row['n_subjects']} subject(s)"
        if not math.isnan(row["p"]):
            text += ", all agree" if math.isnan(row["t"]) else f", t {row['t']:.2f}"
            text += f", p {row['p']:.2g}, sign flips {row['p_flip']:.2g}"
            text += f" (at best {row['p_flip_least']:.2g})"
            text += f", FDR {row['q']:.2g}"
        told.append(text + ")")
    return told
