"""All subjects' searchlight maps together: mean, t, and where the group is above chance.

Maps are compared voxel by voxel, so subjects must be on one grid; the centres that all of them have are
tested. Written are ``maps/group_roi-brain_target-all_accuracy_{searchlight,t,logp,logq}.nii.gz``: the
mean score, Student's t of score less chance, -log10 of its p by sign flips, corrected for all centres, and
-log10 of the false discovery rate of t. Below about ten subjects the corrected p has few values and little
power: six subjects have 64 sign patterns.

Subjects' maps are read one by one and laid out on the disk (``stack``); tests take some centres of all
subjects at a time, under the same sign patterns, so memory grows with the grid, not with the subjects.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from raypipe.fmri.cohort import LEAST
from raypipe.fmri.group import SignFlips, false_discovery_rate, least_p, one_sample_t
from raypipe.fmri.masks import Grid
from raypipe.fmri.report.results import NAMES
from raypipe.fmri.searchlight.settle import ALPHA, peak, save_map
from raypipe.fmri.searchlight.stack import BLOCK_BYTES, Stack, stacked
from raypipe.fmri.units import slug
from raypipe.store.durable import remove

KINDS = ("searchlight", "t", "logp", "logq")  # of maps
_ROUNDING = 1e-6  # of scores as float32: subjects who differ by less agree
_OTHER_GRIDS = (
    "the subjects are on different grids, so there is no group map: give runs of one space"
)
_NO_CENTRE = "no centre lies in every subject's region, so there is no group map"
Record = Mapping[str, Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Tested:
    """Of each centre, (n,): mean of score less chance; t and its p, NaN where subjects agree; p by flips."""

    mean: Floats
    t: Floats
    p: Floats
    p_fwe: Floats
    agree: NDArray[np.bool_]


def group_maps(
    run_dir: Path, records: Sequence[Record], *, seed: int = 0, block_bytes: int = BLOCK_BYTES
) -> list[dict[str, Any]]:
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
        rows.append(_row(run_dir, (roi, target, score), own, seed, block_bytes))
    return rows


def _row(
    run_dir: Path,
    key: tuple[str, str, str],
    records: Sequence[Record],
    seed: int,
    block_bytes: int,
) -> dict[str, Any]:
    roi, target, score = key
    chance = float(np.mean([record["chance"][score] for record in records]))
    values = {record["subject"]: record["scores"][score] for record in records}
    row: dict[str, Any] = {"roi": roi, "target": target, "score": score, "chance": chance}
    row |= {"n_subjects": len(records), "subjects": values, "mean": math.nan}
    row |= dict.fromkeys(("t", "p", "p_flip", "p_flip_least", "q"), math.nan)
    row |= {"x_mm": math.nan, "y_mm": math.nan, "z_mm": math.nan, "n_centres": 0}
    row |= {"above_fwe": 0, "above_fdr": 0, "without_t": 0, "note": ""}
    if len(records) < LEAST:
        return row | {"note": "one subject: no test"}
    files = [run_dir / "maps" / f"{r['unit']}_{score}_searchlight.nii.gz" for r in records]
    grids = [Grid.of(nibabel.load(file)) for file in files]
    if not all(grid.same_as(grids[0]) for grid in grids[1:]):
        return row | {"note": _OTHER_GRIDS}
    chances = [float(record["chance"][score]) for record in records]
    with stacked(files, chances, scratch=run_dir, block_bytes=block_bytes) as stack:
        if not stack.centres.size:
            return row | {"note": _NO_CENTRE}
        stem = f"group_roi-{slug(roi)}_target-{slug(target)}_{score}"
        words, space = (f"{roi}: {target}", NAMES[score]), str(records[0]["space"])
        return row | _written(run_dir, stem, stack, grids[0], chance, words, space, seed)


def _tested(stack: Stack, seed: int) -> _Tested:
    """Every centre, a block of them at a time; sign patterns are the same in all blocks."""
    flips = SignFlips(stack.n_subjects, seed=seed)
    parts = []
    for above in stack.blocks():
        flips.add(above)
        student = one_sample_t(above)
        agree = above.std(axis=0) < _ROUNDING  # no variance, no t; their signs still count
        t, p = (np.where(agree, np.nan, values) for values in (student.t, student.p))
        parts.append((student.mean, t, p, agree))
    mean, t, p, agree = (np.concatenate(values) for values in zip(*parts, strict=True))
    return _Tested(mean=mean, t=t, p=p, p_fwe=flips.result().p_fwe, agree=agree)


def _written(
    run_dir: Path,
    stem: str,
    stack: Stack,
    grid: Grid,
    chance: float,
    words: tuple[str, str],
    space: str,
    seed: int,
) -> dict[str, Any]:
    """Write the maps; what the row says of the group's peak. words : of region and target; of the score."""
    found, (title_of, score) = _tested(stack, seed), words
    q, mean = false_discovery_rate(found.p), found.mean + chance
    n = stack.n_subjects
    maps = (
        (mean, f"mean {score} over {n} subjects", score, chance),
        (found.t, f"t of {score} less chance, {n} subjects", "t", None),
        (-np.log10(found.p_fwe), "corrected p by sign flips", "-log10 p", None),
        (-np.log10(q), "false discovery rate of t", "-log10 q", None),
    )
    for kind, (values, title, what, zero) in zip(KINDS, maps, strict=True):
        told: dict[str, Any] = {"title": f"{title_of}, {title}", "score": what, "space": space}
        told |= {} if zero is None else {"chance": zero}
        save_map(run_dir, f"{stem}_{kind}", values, stack.centres, grid, told)
    top = peak(mean, stack.centres, grid)
    at = top["place"]
    return {
        "mean": top["value"],
        "t": float(found.t[at]),
        "p": float(found.p[at]),
        "p_flip": float(found.p_fwe[at]),
        "p_flip_least": least_p(n),
        "q": float(q[at]),
        **dict(zip(("x_mm", "y_mm", "z_mm"), top["mm"], strict=True)),
        "n_centres": len(stack.centres),
        "above_fwe": int((found.p_fwe < ALPHA).sum()),
        "above_fdr": int((q < ALPHA).sum()),
        "without_t": int(found.agree.sum()),
    }
