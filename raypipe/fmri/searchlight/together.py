"""All subjects' searchlight maps together: mean, t, and where the group is above chance.

Maps are compared voxel by voxel, so subjects must be on one grid; the centres that all of them have are
tested. Written are ``maps/group_roi-brain_target-all_accuracy_{searchlight,t,logp,logq}.nii.gz``: the
mean score, Student's t of score less chance, -log10 of its p by sign flips, corrected for all centres, and
-log10 of the false discovery rate of t. Below about ten subjects the corrected p has few values and little
power: six subjects have 64 sign patterns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from raypipe.fmri.cohort import LEAST
from raypipe.fmri.group import false_discovery_rate, one_sample_t, sign_flip
from raypipe.fmri.masks import Grid, Voxels
from raypipe.fmri.report.results import NAMES
from raypipe.fmri.searchlight.settle import ALPHA, peak, save_map
from raypipe.fmri.units import slug
from raypipe.store.durable import remove

KINDS = ("searchlight", "t", "logp", "logq")  # of maps
_ROUNDING = 1e-6  # of scores as float32: subjects who differ by less agree
Record = Mapping[str, Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Group:
    """Maps of one ROI, target and score. above : (n_subjects, n) score less chance at ``centres``."""

    subjects: tuple[str, ...]
    above: Floats
    chance: float
    centres: Voxels
    grid: Grid
    space: str


def group_maps(run_dir: Path, records: Sequence[Record], *, seed: int = 0) -> list[dict[str, Any]]:
    """A row a (roi, target, score), and the group's maps where there are two subjects or more.

    Rows have the names of ``cohort.group_rows``; mean, t, p and q are those at the group's peak.
    """
    for kind in KINDS:
        remove((run_dir / "maps").glob(f"group_*_{kind}.*"))
    keys = dict.fromkeys(
        (record["roi"], record["target"], score) for record in records for score in record["scores"]
    )
    rows = []
    for roi, target, score in keys:
        own = [r for r in records if (r["roi"], r["target"]) == (roi, target)]
        rows.append(_row(run_dir, roi, target, score, own, seed))
    return rows


def _row(
    run_dir: Path, roi: str, target: str, score: str, records: Sequence[Record], seed: int
) -> dict[str, Any]:
    chance = float(np.mean([record["chance"][score] for record in records]))
    values = {record["subject"]: record["scores"][score] for record in records}
    row: dict[str, Any] = {"roi": roi, "target": target, "score": score, "chance": chance}
    row |= {"n_subjects": len(records), "subjects": values, "mean": math.nan}
    row |= dict.fromkeys(("t", "p", "p_flip", "q"), math.nan)
    row |= {"x_mm": math.nan, "y_mm": math.nan, "z_mm": math.nan, "n_centres": 0}
    row |= {"above_fwe": 0, "above_fdr": 0, "without_t": 0, "note": ""}
    if len(records) < LEAST:
        return row | {"note": "one subject: no test"}
    found = _read(run_dir, score, records)
    if isinstance(found, str):
        return row | {"note": found}
    return row | _tested(run_dir, f"group_roi-{slug(roi)}_target-{slug(target)}_{score}", found,
                         f"{roi}: {target}", NAMES[score], seed)  # fmt: skip


def _tested(
    run_dir: Path, stem: str, group: _Group, words: str, score: str, seed: int
) -> dict[str, Any]:
    """Write the maps; what the row says of the group's peak."""
    student = one_sample_t(group.above)
    flipped = sign_flip(group.above, seed=seed)
    agree = group.above.std(axis=0) < _ROUNDING  # no variance, no t; their signs still count
    p = np.where(agree, np.nan, student.p)
    q = false_discovery_rate(p)
    mean = student.mean + group.chance
    t = np.where(agree, np.nan, student.t)
    n = len(group.subjects)
    maps = (
        (mean, f"mean {score} over {n} subjects", score, group.chance),
        (t, f"t of {score} less chance, {n} subjects", "t", None),
        (-np.log10(flipped.p_fwe), "corrected p by sign flips", "-log10 p", None),
        (-np.log10(q), "false discovery rate of t", "-log10 q", None),
    )
    for kind, (values, title, what, chance) in zip(KINDS, maps, strict=True):
        told: dict[str, Any] = {"title": f"{words}, {title}", "score": what, "space": group.space}
        told |= {} if chance is None else {"chance": chance}
        save_map(run_dir, f"{stem}_{kind}", values, group.centres, group.grid, told)
    top = peak(mean, group.centres, group.grid)
    at = top["place"]
    return {
        "mean": top["value"],
        "t": float(t[at]),
        "p": float(p[at]),
        "p_flip": float(flipped.p_fwe[at]),
        "q": float(q[at]),
        **dict(zip(("x_mm", "y_mm", "z_mm"), top["mm"], strict=True)),
        "n_centres": len(group.centres),
        "above_fwe": int((flipped.p_fwe < ALPHA).sum()),
        "above_fdr": int((q < ALPHA).sum()),
        "without_t": int(agree.sum()),
    }


def _read(run_dir: Path, score: str, records: Sequence[Record]) -> _Group | str:
    """The subjects' maps at the centres that all have; in words why there is no group."""
    folder = run_dir / "maps"
    files = [folder / f"{record['unit']}_{score}_searchlight.nii.gz" for record in records]
    images = [nibabel.load(file) for file in files]
    grids = [Grid.of(image) for image in images]
    if not all(grid.same_as(grids[0]) for grid in grids[1:]):
        return (
            "the subjects are on different grids, so there is no group map: give runs of one space"
        )
    values = [np.asarray(image.dataobj, np.float64).ravel() for image in images]
    inside = functools.reduce(np.logical_and, [np.isfinite(one) for one in values])
    centres = np.flatnonzero(inside).astype(np.int64)
    if not centres.size:
        return "no centre lies in every subject's region, so there is no group map"
    chances = [float(record["chance"][score]) for record in records]
    above = np.stack([one[centres] - c for one, c in zip(values, chances, strict=True)])
    return _Group(
        subjects=tuple(str(record["subject"]) for record in records),
        above=above,
        chance=float(np.mean(chances)),
        centres=centres,
        grid=grids[0],
        space=str(records[0]["space"]),
    )
