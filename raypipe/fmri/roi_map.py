"""The group's score of each ROI painted on its voxels: ``maps/group_target-…_accuracy_roi.nii.gz``.

A voxel of several ROIs shows the highest. Beside each map lies what it is, as ``report.brain`` reads it.
Regions that differ by subject have no voxels in common, so there is no map of them.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from raypipe.fmri.config import MvpaJobConfig
from raypipe.fmri.inputs import runs_of
from raypipe.fmri.ledger import write_whole
from raypipe.fmri.masks import Grid, Voxels
from raypipe.fmri.report.results import FIRST, NAMES
from raypipe.fmri.rois import find_regions, wanted_rois
from raypipe.fmri.units import slug
from raypipe.read.nifti import open_scan
from raypipe.report.saved import write_json
from raypipe.store.durable import remove


def save_roi_maps(cfg: MvpaJobConfig, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """One map a target, of ``rows`` of the group, on the grid of a subject's first run; older ones go.

    None where regions differ by subject.
    """
    remove((cfg.run_dir / "maps").glob("group_*_roi.*"))
    rois = wanted_rois(cfg)
    if not rows or any("{" in spec.source or spec.kind == "brain" for spec in rois):
        return []
    run = runs_of(cfg, next(iter(rows[0]["subjects"])))[0]
    grid = Grid.of(open_scan(run.bold))
    regions = find_regions(rois, run, grid, resample=cfg.resample)
    saved = []
    for target in dict.fromkeys(str(row["target"]) for row in rows):
        own = [row for row in rows if row["target"] == target]
        score = min({str(row["score"]) for row in own}, key=FIRST.index)
        shown = {str(row["roi"]): row for row in own if row["score"] == score}
        values = painted(
            grid, regions.voxels, {roi: float(row["mean"]) for roi, row in shown.items()}
        )
        path = cfg.run_dir / "maps" / f"group_target-{slug(target)}_{score}_roi.nii.gz"
        saved.append(_save(path, values, grid))
        told = {
            "title": f"{target}: mean {NAMES[score]} of each ROI over subjects",
            "score": NAMES[score],
            "chance": float(np.mean([row["chance"] for row in shown.values()])),
            "space": run.space or "",
        }
        write_json(path.with_name(path.name.removesuffix(".nii.gz") + ".json"), told)
    return saved


def painted(
    grid: Grid, voxels: Mapping[str, Voxels], means: Mapping[str, float]
) -> NDArray[np.float32]:
    """(x, y, z), NaN where there is no ROI."""
    flat = np.full(int(np.prod(grid.shape)), np.nan, np.float32)
    for roi, mean in means.items():
        if roi in voxels:
            flat[voxels[roi]] = np.fmax(flat[voxels[roi]], mean)
    return flat.reshape(grid.shape)


def _save(path: Path, values: NDArray[np.float32], grid: Grid) -> Path:
    packed = gzip.compress(nibabel.Nifti1Image(values, grid.affine).to_bytes(), 6, mtime=0)
    return write_whole(path, lambda file: file.write(packed))
