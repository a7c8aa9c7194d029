"""What a model leaves behind: betas as a 4-D image with a table of its trials, or maps of contrasts.

    betas/sub-01_run-1_roi-brain_betas.nii.gz    float32, a volume a trial, NaN outside the region
    betas/sub-01_run-1_roi-brain_trials.tsv      a row a volume: trial_type, onset, duration
    maps/sub-01_roi-brain_target-conditions_face_{effect,t,z}.nii.gz

An image is written volume by volume: a whole brain's trials as one array would take gigabytes.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, BinaryIO

import nibabel
import numpy as np
from numpy.typing import NDArray

from raypipe.errors import InputError
from raypipe.fmri.glm.betas import TrialBetas
from raypipe.fmri.glm.contrasts import GlmResult
from raypipe.fmri.glm.job import BetasConfig
from raypipe.fmri.glm.trials import chosen
from raypipe.fmri.inputs import run_stem
from raypipe.fmri.ledger import write_whole
from raypipe.fmri.maps import map_image
from raypipe.fmri.masks import Grid, Voxels
from raypipe.fmri.units import Unit, slug
from raypipe.read.events import Events
from raypipe.read.runfiles import RunFiles

FOLDER = "betas"
_LEVEL = 1  # of gzip: noise hardly shrinks, and higher levels take ten times as long


def save_trials(
    cfg: BetasConfig,
    unit: Unit,
    run: RunFiles,
    index: int,
    grid: Grid,
    found: TrialBetas,
    events: Events,
) -> tuple[list[Path], dict[str, Any]]:
    """(files, the run's row in the table of all); index : of the run among the subject's."""
    stem = f"{run_stem(run, index)}_roi-{slug(unit.roi)}"
    image = cfg.run_dir / FOLDER / f"{stem}_betas.nii.gz"
    write_volumes(image, found.values, found.voxels, grid)
    rows = ["trial_type\tonset\tduration"]
    for trial in chosen(events, cfg.keep):
        onset, duration = events.onset_s[trial], events.duration_s[trial]
        rows.append(f"{events.trial_type[trial]}\t{onset:.6g}\t{duration:.6g}")
    table = cfg.run_dir / FOLDER / f"{stem}_trials.tsv"
    text = ("\n".join(rows) + "\n").encode()
    write_whole(table, lambda file: file.write(text))
    row = {
        "subject": run.subject,
        "session": run.session or "",
        "task": run.task or "",
        "run": run.run or f"{index + 1}",
        "space": run.space or "",
        "bold": str(image.relative_to(cfg.run_dir)),
        "mask": str(run.mask or ""),
    }
    return [image, table], row


def save_contrasts(
    cfg: BetasConfig, unit: Unit, run: RunFiles, grid: Grid, found: GlmResult
) -> list[Path]:
    """Maps of each contrast: effect (of t contrasts), t or F, and z, which the page draws.

    Raises InputError where two would have the same files.
    """
    if len({slug(name) for name in found.maps}) < len(found.maps):
        raise InputError(
            f"two contrasts of {', '.join(found.maps)} would have the same files; name one by --contrast "
            "NAME='…'"
        )
    files: list[Path] = []
    for name, one in found.maps.items():
        kinds: dict[str, NDArray[np.float64]] = {one.kind: one.stat(), "z": one.z_score()}
        if one.kind == "t":
            kinds["effect"] = one.effect
        for kind, values in kinds.items():
            path = cfg.run_dir / "maps" / f"{unit.unit_id}_{slug(name)}_{kind}.nii.gz"
            image = map_image(values, found.voxels, grid, outside=float("nan"))
            packed = gzip.compress(image.to_bytes(), 6, mtime=0)
            told = {
                "title": f"sub-{unit.subject} {unit.roi}: {name}, {kind}",
                "score": f"{kind} of {name}",
                "space": run.space or "",
                "drawn": kind == "z",
            }
            text = (json.dumps(told, indent=1) + "\n").encode()
            files.append(_write(path, packed))
            side = path.with_name(path.name.removesuffix(".nii.gz") + ".json")
            files.append(_write(side, text))
    return files


def write_volumes(path: Path, values: NDArray[np.float32], voxels: Voxels, grid: Grid) -> Path:
    """values : (n_voxels, m) -> a float32 .nii.gz of (x, y, z, m), NaN elsewhere; a volume at a time."""
    header = _header(grid, values.shape[1])

    def write(file: BinaryIO) -> None:
        with gzip.GzipFile("", "wb", _LEVEL, file, mtime=0) as packed:
            packed.write(header)
            volume = np.full(int(np.prod(grid.shape)), np.nan, "<f4")
            for column in range(values.shape[1]):
                volume[voxels] = values[:, column]
                packed.write(volume.reshape(grid.shape).tobytes(order="F"))

    return write_whole(path, write)


def _header(grid: Grid, n_volumes: int) -> bytes:
    """Of a single-file NIfTI: 348 bytes, and 4 that say that no extension follows."""
    empty = np.broadcast_to(np.float32(0), (*grid.shape, n_volumes))
    header = nibabel.Nifti1Image(empty, grid.affine).header.copy()
    header.set_data_dtype("<f4")
    header.set_xyzt_units("mm")  # its volumes are trials, not times
    header["vox_offset"], header["magic"] = 352, b"n+1"
    header["scl_slope"], header["scl_inter"] = 1, 0
    return bytes(header.binaryblock) + bytes(4)


def _write(path: Path, data: bytes) -> Path:
    return write_whole(path, lambda file: file.write(data))
