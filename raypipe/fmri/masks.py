"""Which voxels an ROI has: from a mask image, an atlas and its labels, or coordinates and a radius.

The answer is always flat C-order indices into the scan's (x, y, z) grid, the order in which nilearn's
maskers list voxels. An image on another grid is an error unless resampling is asked for: a mask shifted
by a voxel still gives numbers, only not of that region.
"""

from __future__ import annotations

import csv
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from numpy.typing import ArrayLike, NDArray

from raypipe.errors import InputError, MissingInput, UnknownName

Voxels = NDArray[np.int64]

# Two affines are of one grid when no corner voxel moves by more than this part of a voxel: headers
# keep float32, and tools round differently.
_SAME_GRID_VOXELS = 1e-3


@dataclass(frozen=True, eq=False, kw_only=True)
class Grid:
    """A scan's voxel grid. shape : (x, y, z) voxels; affine : (4, 4) voxel index -> millimetres."""

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    @classmethod
    def of(cls, scan: Any) -> Grid:
        """The grid of anything with ``shape`` (x, y, z, …) and ``affine``: a scan or an image."""
        x, y, z = (int(n) for n in tuple(scan.shape)[:3])
        return cls(shape=(x, y, z), affine=np.asarray(scan.affine, np.float64))

    def distance_voxels(self, other: Grid) -> float:
        """How far the farthest corner of this grid moves under the other's affine, in voxels."""
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in self.shape])).reshape(3, -1)
        points = np.vstack((corners, np.ones(corners.shape[1])))
        moved = np.linalg.solve(self.affine, other.affine @ points) - points
        return float(np.sqrt((moved[:3] ** 2).sum(0)).max())

    def same_as(self, other: Grid) -> bool:
        """Whether voxel (i, j, k) is the same place in both."""
        return self.shape == other.shape and self.distance_voxels(other) < _SAME_GRID_VOXELS


def mask_voxels(mask: Path | str | Any, grid: Grid, *, resample: bool = False) -> Voxels:
    """The voxels where the mask, a file or an open image, is not 0.

    Raises InputError for none or another grid.
    """
    if isinstance(mask, (str, Path)):
        values = _on_grid(Path(mask), grid, resample, "mask")
    else:
        values = _resampled(_one_volume(mask, "mask", "image"), "image", grid, resample, "mask")
        mask = "image"
    return _some(np.flatnonzero(_inside(values)), f"mask {mask} holds no voxel")


def atlas_voxels(
    path: Path | str,
    grid: Grid,
    labels: Sequence[int | str] = (),
    *,
    names: Mapping[str, int] | None = None,
    resample: bool = False,
) -> dict[str, Voxels]:
    """ROI -> voxels of an atlas image: of ``labels``, numbers or ``names``, or of all labels but 0.

    Raises UnknownName for a label that the atlas has not.
    """
    values = _on_grid(Path(path), grid, resample, "atlas").ravel()
    if not np.array_equal(values, np.round(values)):
        raise InputError(
            f"atlas {path} holds {values[values % 1 != 0][0]}, not whole-number labels"
        )
    numbers = values.astype(np.int64)
    order = np.argsort(numbers, kind="stable")
    present, start = np.unique(numbers[order], return_index=True)
    voxels = dict(zip(present.tolist(), np.split(order, start[1:]), strict=True))
    voxels.pop(0, None)
    called = {number: name for name, number in (names or {}).items()}
    wanted = labels or [called.get(number, str(number)) for number in voxels]
    found = {str(label): voxels.get(_number(label, names, voxels, path)) for label in wanted}
    for label, these in found.items():
        if these is None:
            raise InputError(f"label {label} has no voxel in atlas {path}; leave it out")
    return {
        label: np.sort(these).astype(np.int64)
        for label, these in found.items()
        if these is not None
    }


def atlas_labels(path: Path | str, names: Mapping[str, int] | None = None) -> tuple[str, ...]:
    """All labels of an atlas image but 0, by name where ``names`` has one; raises InputError."""
    return tuple(atlas_voxels(path, Grid.of(_load(Path(path), "atlas")), names=names))


def label_names(path: Path | str) -> dict[str, int]:
    """name -> number of a label table (TSV or CSV with columns index and name, as in BIDS dseg)."""
    path = Path(path)
    if not path.is_file():
        raise MissingInput(f"label table {path} does not exist; give one with columns index, name")
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ","))
        return {row["name"]: int(row["index"]) for row in rows}
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(
            f"label table {path} is not columns index (a whole number) and name: {error}; rewrite it"
        ) from error


def sphere_voxels(centres_mm: ArrayLike, radius_mm: float, grid: Grid) -> Voxels:
    """The voxels whose centre lies within ``radius_mm`` of any of ``centres_mm``, (3,) or (n, 3)."""
    centres = np.atleast_2d(np.asarray(centres_mm, np.float64))
    if centres.ndim != 2 or centres.shape[1] != 3 or not np.isfinite(centres).all():
        raise InputError(f"centres have shape {centres.shape}; give x, y, z in mm for each sphere")
    if not radius_mm > 0:
        raise InputError(f"radius {radius_mm} mm is not above 0; give a positive one")
    inside = [_sphere(centre, radius_mm, grid) for centre in centres]
    return _some(
        np.unique(np.concatenate(inside)),
        f"no voxel centre lies within {radius_mm:g} mm of {centres.tolist()}: outside the scan, or "
        "between voxels",
    )


def _sphere(centre_mm: NDArray[np.float64], radius_mm: float, grid: Grid) -> NDArray[np.intp]:
    """Flat indices; only the box of voxels around the sphere is looked at."""
    inverse = np.linalg.inv(grid.affine)
    middle = inverse[:3, :3] @ centre_mm + inverse[:3, 3]
    reach = radius_mm * np.sqrt((inverse[:3, :3] ** 2).sum(1))  # voxels along each axis
    low = np.maximum(np.floor(middle - reach), 0).astype(int)
    high = np.minimum(np.ceil(middle + reach) + 1, grid.shape).astype(int)
    if (low >= high).any():
        return np.empty(0, np.intp)
    ranges = [np.arange(a, b) for a, b in zip(low, high, strict=True)]
    ijk = np.stack(np.meshgrid(*ranges, indexing="ij")).reshape(3, -1)
    mm = grid.affine[:3, :3] @ ijk + grid.affine[:3, 3:]
    near = ((mm - centre_mm[:, np.newaxis]) ** 2).sum(0) <= radius_mm**2 * (1 + 1e-9)
    return np.ravel_multi_index(tuple(ijk[:, near]), grid.shape)


def _number(
    label: int | str, names: Mapping[str, int] | None, voxels: Mapping[int, Any], path: Path | str
) -> int:
    """The atlas number of a label given as number, as its text, or as a name."""
    if names and str(label) in names:
        return names[str(label)]
    text = str(label).strip()
    if text.lstrip("-").isdigit() and int(text) in voxels:
        return int(text)
    known = list(names or ()) or [str(number) for number in voxels]
    raise UnknownName.of("atlas label", str(label), known, f"atlas {path} has {len(voxels)} labels")


def _inside(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a mask is neither 0 nor NaN."""
    whole = values.dtype.kind in "biu"
    return values != 0 if whole else (values != 0) & ~np.isnan(values)


def _on_grid(path: Path, grid: Grid, resample: bool, what: str) -> NDArray[Any]:
    """The image's values (x, y, z) on ``grid``."""
    return _resampled(_load(path, what), path, grid, resample, what)


def _resampled(image: Any, path: Path | str, grid: Grid, resample: bool, what: str) -> NDArray[Any]:
    """The values of a 3-D image on ``grid``; path : what messages call it."""
    if Grid.of(image).same_as(grid):
        return _values(image, path, what).reshape(grid.shape)
    if not resample:
        raise InputError(_mismatch(path, Grid.of(image), grid, what))
    from nilearn.image import resample_img

    _values(image, path, what)  # a file that breaks off says so in our words
    moved = resample_img(
        image,
        target_affine=grid.affine,
        target_shape=grid.shape,
        interpolation="nearest",
        copy_header=True,
        force_resample=True,
    )
    return np.asarray(moved.dataobj, np.float64)


def _values(image: Any, path: Path | str, what: str) -> NDArray[Any]:
    """All values of ``image``, whole numbers as stored; raises InputError for a file that breaks off."""
    try:
        return np.asarray(image.dataobj)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"{what} {path} cannot be read: {why}; copy it again") from error


def _mismatch(path: Path | str, of: Grid, grid: Grid, what: str) -> str:
    if of.shape != grid.shape:
        told = f"has {of.shape} voxels, the scan {grid.shape}"
    else:
        told = f"lies up to {grid.distance_voxels(of):.2g} voxels away from the scan's grid"
    return (
        f"{what} {path} {told}; give resample to take the nearest voxels, or a {what} on its grid"
    )


def _load(path: Path, what: str) -> Any:
    """The image, 3-D or 4-D with one volume."""
    if not path.is_file():
        raise MissingInput(f"{what} {path} does not exist; give a NIfTI file")
    try:
        image = nibabel.load(path)
    except (ImageFileError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{what} {path} is not a readable NIfTI image: {error}") from error
    return _one_volume(image, what, path)


def _one_volume(image: Any, what: str, path: Path | str) -> Any:
    """The 3-D image, of one or of a 4-D image with one volume."""
    shape = tuple(image.shape)
    if len(shape) == 4 and shape[3] == 1:
        return image.slicer[..., 0]
    if len(shape) != 3:
        raise InputError(
            f"{what} {path} has shape {shape}; it must be one volume of three dimensions"
        )
    return image


def _some(voxels: NDArray[np.intp], else_said: str) -> Voxels:
    if voxels.size == 0:
        raise InputError(f"{else_said}; choose another region")
    return voxels.astype(np.int64)
