"""The page's sections on scores: for each target a figure by ROI, the group's table, confusions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raypipe.fmri.cohort import at_best
from raypipe.fmri.report import plots
from raypipe.fmri.report.results import NAMES, Results, RoiScores, roi_scores
from raypipe.report.blocks import Block, Card, Picture, Section, Table
from raypipe.report.plots import data_uri

MOST_ROIS = 60  # in a figure; all are in the table
MOST_CONFUSIONS = 8


def decoding_section(results: Results, target: str) -> Section:
    """Everything on one target."""
    score = results.first_score(target)
    rows = roi_scores(results, target, score)
    blocks: list[Block] = [_picture(rows, score, results), _table(results, target)]
    if matrices := _confusions(results, target, rows):
        blocks.append(matrices)
    return Section(f"Decoding: {target}", blocks)


def cards(results: Results) -> list[Card]:
    """For each target: how many ROIs carry it, and the best."""
    found = []
    for target in results.targets[:3]:
        score = results.first_score(target)
        rows = roi_scores(results, target, score)
        if not rows:
            continue
        best = max(rows, key=lambda row: row.mean - row.chance)
        tested = [row for row in rows if np.isfinite(row.q)]
        above = sum(row.q < plots.ALPHA for row in tested)
        detail = f"{NAMES.get(score, score)} in {best.roi}, chance {best.chance:.3g}"
        if tested:
            detail += f"; {above} of {len(tested)} ROIs above chance (q < {plots.ALPHA})"
        found.append(Card(target, f"{best.mean:.3f}", detail))
    return found


def best_first(rows: Sequence[RoiScores], most: int) -> list[RoiScores]:
    """The ``most`` ROIs farthest above chance, in their own order."""
    if len(rows) <= most:
        return list(rows)
    chosen = sorted(rows, key=lambda row: row.mean - row.chance, reverse=True)[:most]
    return [row for row in rows if any(row is one for one in chosen)]


def _picture(rows: Sequence[RoiScores], score: str, results: Results) -> Picture:
    shown = best_first(rows, MOST_ROIS)
    name = NAMES.get(score, score)
    caption = (
        f"{name[0].upper()}{name[1:]} on held-out data, mean over folds; each point a subject."
    )
    if any(row.band for row in rows):
        caption += (
            " Grey: where the mean of these subjects lies in 95 % of permutations of their labels"
            " within runs, one drawn for each subject by itself; a filled point is a subject whose own"
            " permutation p is below 0.05."
        )
    if any(np.isfinite(row.q) for row in rows):
        caption += " Right: false discovery rate of the subjects' t test against chance."
    if len(shown) < len(rows):
        caption += f" The {len(shown)} ROIs of {len(rows)} that lie farthest above chance."
    return Picture(
        data_uri(plots.scores_by_roi(shown, name)),
        f"{name} in {len(shown)} ROIs, {len(results.units)} units, subjects as points over chance",
        caption,
    )


def _table(results: Results, target: str) -> Table:
    """All scores of ``target``; the group's test where there is one."""
    header = ["ROI", "score", "subjects", "mean", "sd", "chance", "t", "p", "q", "p, sign flips"]
    header.append("subjects with p < 0.05")
    body, sizes = [], set[int]()
    for score in dict.fromkeys(name for unit in results.of(target) for name in unit["scores"]):
        for row in roi_scores(results, target, score):
            body.append([row.roi, NAMES.get(score, score), *_numbers(row)])
            sizes.add(len(row.values))
    caption = "All subjects together." + at_best(min(sizes, default=0))
    return Table(header, body, caption, numeric_from=2, folded=len(body) > 40)


def _numbers(row: RoiScores) -> list[str]:
    of = row.row or {}
    tested = np.isfinite(row.p)
    sd = row.values.std(ddof=1) if len(row.values) > 1 else None
    return [
        str(len(row.values)), f"{row.mean:.3f}", "–" if sd is None else f"{sd:.3f}",
        f"{row.chance:.3f}", _text(of.get("t"), ".2f"), _text(of.get("p"), ".2g"),
        _text(of.get("q"), ".2g"), _text(of.get("p_flip"), ".2g"),
        f"{int((row.p[tested] < plots.ALPHA).sum())} of {int(tested.sum())}" if tested.any() else "–",
    ]  # fmt: skip


def _text(value: float | None, how: str) -> str:
    return "–" if value is None else format(value, how)


def _confusions(results: Results, target: str, rows: Sequence[RoiScores]) -> Picture | None:
    """Of the ROIs farthest above chance, summed over subjects of the same classes."""
    found = []
    for row in best_first(rows, MOST_CONFUSIONS):
        units = [unit for unit in results.of(target) if unit["roi"] == row.roi]
        units = [unit for unit in units if unit.get("confusion") is not None]
        classes = {tuple(unit["classes"]) for unit in units}
        if len(classes) != 1:  # none, or subjects that saw different things
            continue
        counts = np.sum([unit["confusion"] for unit in units], axis=0)
        found.append(plots.Confusion(title=row.roi, classes=classes.pop(), counts=counts))
    if not found:
        return None
    caption = "What held-out samples of each class were taken for, all folds of all subjects."
    if len(found) < len(rows):
        caption += f" {len(found)} of {len(rows)} ROIs, those farthest above chance."
    return Picture(
        data_uri(plots.confusions(found)), f"Confusion matrices of {len(found)} ROIs", caption
    )
