"""The page's sections on searchlights: where each subject's highest sphere lies, and the group's."""

from __future__ import annotations

from typing import Any

from raypipe.fmri.cohort import at_best
from raypipe.fmri.report.results import NAMES, Record, Results
from raypipe.report.blocks import Block, Card, Note, Section, Table

ALPHA = 0.05


def searchlight_section(results: Results, target: str) -> Section:
    """Everything on one target but its maps, which have a section of their own."""
    rows = [row for row in results.group if row["target"] == target]
    blocks: list[Block] = []
    if tested := [row for row in rows if row["n_centres"]]:
        blocks.append(_group(tested))
    if rows:
        blocks += [Note(f"{row['roi']}: {row['note']}.") for row in rows if row["note"]]
    blocks.append(_subjects(results.of(target)))
    return Section(f"Searchlight: {target}", blocks)


def searchlight_cards(results: Results) -> list[Card]:
    """For each target the highest sphere: of the group's mean, else of any subject."""
    found = []
    for target in results.targets[:3]:
        score = results.first_score(target)
        name = NAMES.get(score, score)
        rows = [r for r in results.group if (r["target"], r["score"]) == (target, score)]
        tested = [row for row in rows if row.get("mean") is not None]
        if tested:
            row = max(tested, key=lambda row: row["mean"])
            detail = f"{name} of the group at {_at(row)}, chance {row['chance']:.3g}; "
            detail += f"{row['above_fwe']} of {row['n_centres']} centres above chance, corrected"
            found.append(Card(target, f"{row['mean']:.3f}", detail))
            continue
        units = [u for u in results.of(target) if u["scores"].get(score) is not None]
        if units:
            unit = max(units, key=lambda unit: unit["scores"][score])
            detail = f"highest {name}, sub-{unit['subject']}, chance {unit['chance'][score]:.3g}"
            found.append(Card(target, f"{unit['scores'][score]:.3f}", detail))
    return found


def _group(rows: list[Record]) -> Table:
    header = ["region", "score", "subjects", "centres", "highest mean", "at, mm", "chance", "t"]
    header += ["p, sign flips", "centres p < 0.05", "centres FDR < 0.05"]
    body = [
        [
            row["roi"], NAMES.get(row["score"], row["score"]), str(row["n_subjects"]),
            f"{row['n_centres']:,}", _text(row["mean"], ".3f"), _at(row), f"{row['chance']:.3f}",
            _text(row["t"], ".2f"), _text(row["p_flip"], ".2g"), f"{row['above_fwe']:,}",
            f"{row['above_fdr']:,}",
        ]
        for row in rows
    ]  # fmt: skip
    caption = (
        "All subjects together, at the centre of highest mean score; p by sign flips of subjects and "
        "the count beside it are corrected for all centres. Where all subjects agree to the digit there "
        "is no t." + at_best(min(row["n_subjects"] for row in rows))
    )
    return Table(header, body, caption, numeric_from=2)


def _subjects(units: list[Record]) -> Table:
    header = ["subject", "region", "score", "highest", "at, mm", "median", "chance", "p, corrected"]
    header += ["spheres p < 0.05", "spheres", "voxels each", "empty", "not finite", "samples"]
    header += ["blocks", "seconds"]
    body = [_subject(unit, score) for unit in units for score in unit["scores"]]
    caption = "Each subject's highest sphere; p against the highest of all spheres in permutations."
    return Table(header, body, caption, numeric_from=3, folded=len(body) > 24)


def _subject(unit: Record, score: str) -> list[str]:
    mm = unit["peaks_mm"].get(score)
    low, middle, high = unit["sphere_voxels"]
    return [
        str(unit["subject"]), unit["roi"], NAMES.get(score, score), _text(unit["scores"][score], ".3f"),
        "–" if mm is None else ", ".join(f"{x:.0f}" for x in mm),
        _text(unit["median"].get(score), ".3f"), f"{unit['chance'][score]:.3f}",
        _text(unit["p"].get(score), ".2g"),
        f"{unit['above'][score]:,}" if score in unit["above"] else "–",
        f"{unit['n_centres']:,}", f"{low} to {high}, median {middle}", f"{unit['empty_spheres']:,}",
        f"{unit['not_finite']:,}", f"{unit['n_samples']:,}", f"{unit['n_blocks']:,}",
        f"{unit['seconds']:.1f}",
    ]  # fmt: skip


def _at(row: Record) -> str:
    if row.get("x_mm") is None:
        return "–"
    return ", ".join(f"{row[f'{axis}_mm']:.0f}" for axis in "xyz")


def _text(value: Any, how: str) -> str:
    return "–" if value is None else format(value, how)
