"""Values of voxels -> a NIfTI image on the scan's grid."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from raypipe.errors import InputError
from raypipe.fmri.masks import Grid, Voxels
from raypipe.store.durable import make_dirs, write_atomic


def map_image(
    values: NDArray[np.generic], voxels: Voxels, grid: Grid, *, outside: float = 0.0
) -> Any:
    """A nibabel.Nifti1Image float32 of ``values`` (n,) or (n, k) at flat indices ``voxels`` (n,)."""
    if len(values) != len(voxels):
        raise InputError(f"{len(values)} values for {len(voxels)} voxels; give one a voxel")
    shape = (*grid.shape, *values.shape[1:])
    volume = np.full((int(np.prod(grid.shape)), *values.shape[1:]), outside, np.float32)
    volume[voxels] = values
    return nibabel.Nifti1Image(volume.reshape(shape), grid.affine)


def write_map(path: Path, values: NDArray[np.generic], voxels: Voxels, grid: Grid) -> Path:
    """``map_image`` as a file (.nii or .nii.gz), whole or not at all; NaN outside."""
    if not path.name.endswith((".nii", ".nii.gz")):
        raise InputError(f"map {path} must end in .nii or .nii.gz")
    make_dirs(path.parent)
    data = map_image(values, voxels, grid, outside=float("nan")).to_bytes()
    write_atomic(path, gzip.compress(data, 6, mtime=0) if path.suffix == ".gz" else data)
    return path
