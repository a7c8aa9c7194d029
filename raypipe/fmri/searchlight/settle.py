"""All blocks of a map are on the disk: put them together, write the maps, record the unit as done.

``maps/sub-01_roi-brain_target-face-house_accuracy_searchlight.nii.gz`` holds the score at each centre,
NaN elsewhere; with permutations ``…_accuracy_logp.nii.gz`` holds -log10 of its p value, corrected for
the number of spheres. Beside each lies what it is, as ``report.brain`` reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raypipe.fmri.ledger import Ledger
from raypipe.fmri.maps import write_map
from raypipe.fmri.masks import Grid, Voxels
from raypipe.fmri.report.results import NAMES
from raypipe.fmri.results import source_of
from raypipe.fmri.searchlight.blockfile import FOLDER, SavedBlock, block_path, load_block
from raypipe.fmri.searchlight.job import SearchlightJobConfig
from raypipe.fmri.searchlight.lay_out import Light
from raypipe.fmri.searchlight.result import SearchlightMap, assemble
from raypipe.fmri.units import RoiSpec
from raypipe.read.nifti import open_scan
from raypipe.report.saved import write_json
from raypipe.store.durable import remove

ALPHA = 0.05
Floats = NDArray[np.float64]


def settle(cfg: SearchlightJobConfig, light: Light, spec: RoiSpec) -> None:
    """Write the maps of ``light`` and its record; blocks that are no longer of it go."""
    unit, ledger = light.unit, Ledger(cfg.run_dir)
    blocks = [load_block(block_path(cfg.run_dir, unit, item.number)) for item in light.items]
    whole = assemble(light.plan, [block.scores for block in blocks])
    chance = blocks[0].chance
    ledger.begin(unit)
    files = []
    space = light.runs[0].space or ""
    words = f"sub-{unit.subject} {unit.roi}: {unit.target}"
    for score, values in whole.scores.items():
        stem = f"{unit.unit_id}_{score}"
        told: dict[str, Any] = {
            "title": f"{words}, {NAMES[score]} around each voxel",
            "score": NAMES[score],
        }
        told |= {"chance": chance[score], "space": space}
        files += save_map(
            cfg.run_dir, f"{stem}_searchlight", values, whole.centres, whole.grid, told
        )
        if score in whole.p_corrected:
            told = {"title": f"{words}, corrected p of {NAMES[score]}", "score": "-log10 p"}
            told |= {"space": space}
            log = -np.log10(whole.p_corrected[score])
            files += save_map(cfg.run_dir, f"{stem}_logp", log, whole.centres, whole.grid, told)
    fields = _fields(cfg, light, spec, whole, blocks)
    ledger.finish(unit, fields, files)
    known = {block_path(cfg.run_dir, unit, item.number).name for item in light.items}
    folder = cfg.run_dir / FOLDER / unit.unit_id
    remove(path for path in folder.glob("*.npz") if path.name not in known)


def save_map(
    run_dir: Path,
    name: str,
    values: Floats,
    voxels: Voxels,
    grid: Grid,
    told: Mapping[str, Any],
) -> list[Path]:
    """``maps/NAME.nii.gz`` and what it is, ``maps/NAME.json``."""
    path = write_map(run_dir / "maps" / f"{name}.nii.gz", values, voxels, grid)
    return [path, write_json(path.with_name(f"{name}.json"), told)]


def peak(values: Floats, voxels: Voxels, grid: Grid) -> dict[str, Any]:
    """The highest value and where it lies; all None where there is no value."""
    if not np.isfinite(values).any():
        return {"value": None, "mm": None, "place": None}
    at = int(np.nanargmax(values))
    ijk = np.array(np.unravel_index(voxels[at], grid.shape))
    mm = grid.affine[:3, :3] @ ijk + grid.affine[:3, 3]
    return {"value": float(values[at]), "mm": [round(float(x), 2) for x in mm], "place": at}


def _fields(
    cfg: SearchlightJobConfig,
    light: Light,
    spec: RoiSpec,
    whole: SearchlightMap,
    blocks: list[SavedBlock],
) -> dict[str, Any]:
    """The record of a map. scores : the highest of any sphere; p : of that, corrected."""
    peaks = {name: peak(values, whole.centres, whole.grid) for name, values in whole.scores.items()}
    p = {name: _number(whole.p_corrected[name], peaks[name]["place"]) for name in whole.p_corrected}
    return {
        "runs": [source_of(cfg, open_scan(run.bold), run, spec) for run in light.runs],
        "scores": {name: found["value"] for name, found in peaks.items()},
        "peaks_mm": {name: found["mm"] for name, found in peaks.items()},
        "median": {name: _median(values) for name, values in whole.scores.items()},
        "p": p,
        "above": {name: int((values < ALPHA).sum()) for name, values in whole.p_corrected.items()},
        "chance": blocks[0].chance,
        "n_permutations": whole.n_permutations,
        "radius_mm": whole.radius_mm,
        "space": light.runs[0].space or "",
        "n_centres": len(whole.centres),
        "n_blocks": len(blocks),
        "sphere_voxels": [int(f(whole.n_voxels)) for f in (np.min, np.median, np.max)],
        "empty_spheres": int((whole.n_voxels == 0).sum()),
        "n_samples": blocks[0].n_samples,
        "n_folds": blocks[0].n_folds,
        "not_finite": sum(block.not_finite for block in blocks),
        "constant": sum(block.constant for block in blocks),
        "ways": list(blocks[0].ways),
        "seconds": sum(block.seconds for block in blocks),
        "seconds_reading": sum(block.seconds_reading for block in blocks),
        "peak_anon_bytes": max(block.peak_anon_bytes for block in blocks),
        "warnings": list(
            dict.fromkeys([*whole.warnings, *(text for b in blocks for text in b.warnings)])
        ),
    }


def _number(values: Floats, at: int | None) -> float | None:
    return None if at is None or not math.isfinite(values[at]) else float(values[at])


def _median(values: Floats) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else None
