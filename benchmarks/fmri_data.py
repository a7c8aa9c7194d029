"""The scans and regions of benchmarks/fmri.py, made up and written volume by volume.

A brain (a quarter of the grid, as 2 mm MNI scans have it) of 700 to 1300 with autocorrelated, smooth
noise of 2 %, zeros around it; compressed as nibabel does (gzip level 1). float32 has noise in all its
bits; int16 has slope and intercept. Regions are the voxels nearest to a point; the atlas has 100 labels,
each voxel that of the nearest of 100 points.
Run as a script, it writes one scan: scans are made in processes of their own.
"""

from __future__ import annotations

import csv
import gzip
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

AFFINE = np.array([[2.0, 0, 0, -90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
TR_S = 2.0
SLOPE, INTER = 0.02, 650.0
N_LABELS = 100
_FIELDS = 12  # of smooth noise; volumes take them shifted and with either sign


@dataclass(frozen=True, kw_only=True)
class Size:
    """shape : (x, y, z); rois : name of a size -> voxels."""

    shape: tuple[int, int, int]
    volumes: int
    rois: dict[str, int]


FULL = Size(shape=(91, 109, 91), volumes=320, rois={"1k": 1000, "5k": 5000, "10k": 10_000})
QUICK = Size(shape=(24, 28, 24), volumes=60, rois={"1k": 100, "5k": 500, "10k": 1000})
ROIS_EACH = 5  # regions of each size


def make_inputs(folder: Path, size: Size) -> None:
    """f32.nii.gz, i16.nii.gz, i16x2.nii.gz of twice the volumes, mask, regions, atlas, tables."""
    jobs = [("f32", size.volumes), ("i16", size.volumes), ("i16x2", 2 * size.volumes)]
    numbers = [str(n) for n in size.shape]
    for pair in (jobs[:2], jobs[2:]):  # two cores
        started = [
            subprocess.Popen([sys.executable, __file__, str(folder), name, str(n), *numbers])
            for name, n in pair
        ]
        if any(child.wait() for child in started):
            raise SystemExit("a scan could not be made; see above")
    _make_regions(folder, size)
    for name, _ in jobs:
        write_table(folder / f"{name}.csv", folder, [f"{name}.nii.gz"])


def write_table(path: Path, folder: Path, scans: list[str]) -> None:
    """A table of one subject a scan, all with the brain mask; subjects are 01, 02, …"""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "bold", "mask"])
        for number, scan in enumerate(scans, start=1):
            writer.writerow([f"{number:02d}", folder / scan, folder / "mask.nii.gz"])


def brain(shape: tuple[int, int, int]) -> np.ndarray:
    """(x, y, z) bool: an ellipsoid that fills a quarter of the grid."""
    axes = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in shape)]
    return np.asarray(sum(axis**2 for axis in axes) <= 0.783**2)


def write_scan(path: Path, name: str, shape: tuple[int, int, int], n: int) -> None:
    """``n`` volumes; float32 or, for a name that begins with i16, scaled int16."""
    scaled = name.startswith("i16")
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16 if scaled else np.float32)
    header.set_data_shape((*shape, n))
    header.set_sform(AFFINE, 1)
    header.set_qform(AFFINE, 1)
    header.set_zooms((2.0, 2.0, 2.0, TR_S))
    header.set_xyzt_units("mm", "sec")
    header["vox_offset"] = 352
    header["scl_slope"], header["scl_inter"] = (SLOPE, INTER) if scaled else (1.0, 0.0)
    with gzip.GzipFile(path, "wb", compresslevel=1, mtime=0) as file:
        file.write(header.binaryblock + bytes(4))
        for values in _volumes(shape, n):
            if scaled:
                values = np.round((values - INTER) / SLOPE).astype(np.int16)
            file.write(values.tobytes("F"))


def _volumes(shape: tuple[int, int, int], n: int) -> Iterator[np.ndarray]:
    """(x, y, z) float32 each."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(0)
    inside = brain(shape)
    fields = [gaussian_filter(rng.standard_normal(shape, np.float32), 0.8) for _ in range(_FIELDS)]
    fields = [field / field.std() for field in fields]
    mean = np.where(inside, rng.uniform(700, 1300, shape), 0).astype(np.float32)
    deviation = np.where(inside, 20, 0).astype(np.float32)
    noise = fields[0]
    for _ in range(n):
        shift = tuple(int(rng.integers(size)) for size in shape)
        fresh = np.roll(fields[rng.integers(_FIELDS)], shift, (0, 1, 2))
        noise = np.float32(0.4) * noise + np.float32(0.917 * rng.choice((-1, 1))) * fresh
        yield mean + deviation * noise


def _make_regions(folder: Path, size: Size) -> None:
    rng = np.random.default_rng(1)
    inside = brain(size.shape)
    voxels = np.argwhere(inside)
    _save(inside, folder / "mask.nii.gz")
    for name, n in size.rois.items():
        for k in range(ROIS_EACH):
            centre = voxels[rng.integers(len(voxels))]
            nearest = np.argsort(((voxels - centre) ** 2).sum(1), kind="stable")[:n]
            region = np.zeros(size.shape, np.uint8)
            region[tuple(voxels[nearest].T)] = 1
            _save(region, folder / f"roi_{name}_{k}.nii.gz")
    centres = voxels[rng.choice(len(voxels), N_LABELS, replace=False)]
    best, label = np.full(len(voxels), np.inf), np.zeros(len(voxels), np.uint8)
    for number, centre in enumerate(centres, start=1):
        distance = ((voxels - centre) ** 2).sum(1)
        label[distance < best] = number
        best = np.minimum(best, distance)
    atlas = np.zeros(size.shape, np.uint8)
    atlas[inside] = label
    _save(atlas, folder / "atlas.nii.gz")


def _save(values: np.ndarray, path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(values.astype(np.uint8), AFFINE), path)


if __name__ == "__main__":
    x, y, z = (int(n) for n in sys.argv[4:7])
    target = Path(sys.argv[1]) / f"{sys.argv[2]}.nii.gz"
    write_scan(target, sys.argv[2], (x, y, z), int(sys.argv[3]))
