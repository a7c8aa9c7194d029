"""Where a subject's runs lie, and which voxels a region has on their grid.

Data are an fMRIPrep tree, a table, a mapping of subjects to files, or nothing: then a subject is given
as the file itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.errors import InputError, UnknownName
from raypipe.fmri.masks import Grid, Voxels, mask_voxels
from raypipe.read.bids import BidsQuery, find_runs
from raypipe.read.nifti import Scan
from raypipe.read.runfiles import RunFiles, bare
from raypipe.read.runtable import choose_runs

Files = str | Path | Sequence[str | Path]
Data = str | Path | Mapping[str, Files] | None


def subject_runs(
    data: Data, subject: Files, query: BidsQuery, raw_dir: Path | None = None
) -> tuple[RunFiles, ...]:
    """The runs of ``subject`` in ``data``. Raises MissingInput, UnknownName, InputError."""
    if data is None:
        return _files("scan", subject)
    if not isinstance(subject, str):
        raise InputError(f"subject {subject!r} is no name; give one, or a loader without data")
    if isinstance(data, Mapping):
        if subject not in data:
            raise UnknownName.of("subject", subject, map(str, data))
        return _files(subject, data[subject])
    root = Path(data)
    if root.is_dir():
        return find_runs(root, replace(query, subjects=(subject,)), raw_root=raw_dir)
    return choose_runs(root, bare(subject, "sub"), query)


def _files(subject: str, files: Files) -> tuple[RunFiles, ...]:
    paths = [files] if isinstance(files, (str, Path)) else list(files)
    if not paths:
        raise InputError(f"subject {subject} has no file; give one scan or more")
    return tuple(
        RunFiles(subject=subject, run=str(n) if len(paths) > 1 else None, bold=Path(path))
        for n, path in enumerate(paths, start=1)
    )


def one_run(runs: Sequence[RunFiles], wanted: str | int | None) -> RunFiles:
    """The run that is named, or the only one. Raises InputError, UnknownName."""
    if wanted is None:
        if len(runs) > 1:
            raise InputError(
                f"sub-{runs[0].subject} has {len(runs)} runs, {', '.join(_names(runs))}; choose one "
                "by run="
            )
        return runs[0]
    named = [run for run in runs if _same(run.run, str(wanted))]
    if not named:
        raise UnknownName.of("run", str(wanted), _names(runs), f"of sub-{runs[0].subject}")
    if len(named) > 1:
        raise InputError(
            f"run {wanted} of sub-{runs[0].subject} is there {len(named)} times: "
            f"{', '.join(run.name for run in named)}; choose session and task by query="
        )
    return named[0]


def _same(run: str | None, wanted: str) -> bool:
    return run is not None and run.lstrip("0") == bare(wanted, "run").lstrip("0")


def _names(runs: Sequence[RunFiles]) -> list[str]:
    return [run.run or run.bold.name for run in runs]


def roi_voxels(roi_mask: Any, grid: Grid, *, resample: bool) -> Voxels:
    """(n,) flat C-order indices of a mask file or image, a boolean (x, y, z) array, or indices.

    Raises InputError for an empty region and for another grid.
    """
    if isinstance(roi_mask, (str, Path)) or hasattr(roi_mask, "dataobj"):
        return mask_voxels(roi_mask, grid, resample=resample)
    values = np.asarray(roi_mask)
    if values.shape == grid.shape and values.dtype.kind in "biuf":
        return _some(np.flatnonzero(values).astype(np.int64))
    if values.ndim == 1 and values.dtype.kind in "iu":
        return _some(_indices(values, grid))
    raise InputError(
        f"roi_mask of shape {values.shape} and type {values.dtype} is neither a mask of the grid "
        f"{grid.shape} nor a list of voxel indices; give one, or a NIfTI mask"
    )


def _indices(values: np.ndarray, grid: Grid) -> Voxels:
    n = int(np.prod(grid.shape))
    if values.size and (values.min() < 0 or values.max() >= n):
        wrong = int(values[(values < 0) | (values >= n)][0])
        raise InputError(
            f"voxel {wrong} lies outside 0..{n - 1}, the grid {grid.shape}; correct it"
        )
    return values.astype(np.int64)


def _some(voxels: Voxels) -> Voxels:
    if not voxels.size:
        raise InputError("roi_mask holds no voxel; choose another region")
    return voxels


class BrainMasks:
    """Brain masks of runs as voxels; the last few are kept, for reading one takes longer than an ROI."""

    def __init__(self, keep: int = 4) -> None:
        self._keep = keep
        self._known: dict[tuple[Any, ...], Voxels] = {}

    def holding(
        self, run: RunFiles, scan: Scan, voxels: Voxels, *, resample: bool
    ) -> Voxels | None:
        """The run's mask if it holds all of ``voxels``: a smaller cache entry; else None, the grid."""
        if run.mask is None:
            return None
        brain = self._of(run.mask, Grid.of(scan), resample)
        place = np.minimum(np.searchsorted(brain, voxels), brain.size - 1)  # np.isin: 3 ms more
        return brain if bool((brain[place] == voxels).all()) else None

    def _of(self, path: Path, grid: Grid, resample: bool) -> Voxels:
        if not path.is_file():  # said by who reads it
            return mask_voxels(path, grid, resample=resample)
        stat = path.stat()
        key = (path, stat.st_mtime_ns, stat.st_size, grid.shape, grid.affine.tobytes(), resample)
        if key not in self._known:
            self._known[key] = mask_voxels(path, grid, resample=resample)
            while len(self._known) > self._keep:
                del self._known[next(iter(self._known))]
        return self._known[key]
