"""What a cache entry is called, which files it has, and what its manifest says.

``<cache>/`` holds for an entry::

    KEY/data.npy        (n_voxels, n_volumes) in the scan's own dtype, little-endian; a valid .npy
    KEY/voxels.npy      (n_voxels,) int64, ascending C-order flat indices: the mask
    KEY/manifest.json   source, scaling, geometry, checksums; a KEY folder is always whole
    KEY.lock            held alone by who builds or removes it, shared by who reads it; its time is
                        that of the last use
    .KEY.building/      while it is built, or after a crash: the next build removes it
    .KEY.gone/          while it is removed

The key tells everything that the bytes depend on, so a changed scan is another entry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from raypipe.errors import InputError, StoreCorrupt
from raypipe.read.nifti import Scan
from raypipe.read.sample import content_sample

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class EntryPaths:
    """The names of one entry."""

    cache: Path
    key: str

    @property
    def folder(self) -> Path:
        """The entry; there when it is whole."""
        return self.cache / self.key

    @property
    def building(self) -> Path:
        """The entry while it is built."""
        return self.cache / f".{self.key}.building"

    @property
    def gone(self) -> Path:
        """The entry while it is removed."""
        return self.cache / f".{self.key}.gone"

    @property
    def lock(self) -> Path:
        """The lock file."""
        return self.cache / f"{self.key}.lock"

    @property
    def manifest(self) -> Path:
        """The manifest of the whole entry."""
        return self.folder / "manifest.json"


@dataclass(frozen=True, kw_only=True)
class EntryManifest:
    """What an entry says of itself.

    source   : path, size_bytes, mtime_ns, header_hash, sample
    dtype    : of data.npy, e.g. ``<i2``; values are raw * slope + inter
    cell_rows: voxels a checksum covers; checksums: xxh3_64 of each cell, in order
    """

    format: int
    source: dict[str, Any]
    mask_hash: str
    shape: tuple[int, int, int, int]
    n_voxels: int
    dtype: str
    slope: float
    inter: float
    affine: list[list[float]]
    tr_s: float | None
    codec: str
    cell_rows: int
    checksums: list[int]

    def to_bytes(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def read(cls, path: Path) -> EntryManifest:
        """The manifest at ``path``; StoreCorrupt when it is not one of this format."""
        try:
            fields = json.loads(path.read_bytes())
            fields["shape"] = tuple(fields["shape"])
            manifest = cls(**fields)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StoreCorrupt(
                f"cache entry {path.parent} has no readable manifest ({error}); remove the folder"
            ) from error
        if manifest.format != FORMAT:
            raise StoreCorrupt(
                f"cache entry {path.parent} is of format {manifest.format}, this is {FORMAT}; "
                "remove the folder"
            )
        return manifest


def source_facts(scan: Scan) -> dict[str, Any]:
    """What identifies the file's content, its sampled bytes included."""
    return {
        "path": str(scan.path.resolve()),
        "size_bytes": scan.size_bytes,
        "mtime_ns": scan.mtime_ns,
        "header_hash": scan.header_hash,
        "sample": content_sample(scan.path, scan.size_bytes),
    }


def entry_key(source: Mapping[str, Any], mask: str) -> str:
    """32 hex digits, of all that the entry's bytes depend on."""
    text = json.dumps({**source, "mask": mask, "format": FORMAT}, sort_keys=True)
    return str(xxhash.xxh3_128_hexdigest(text.encode()))


def mask_hash(voxels: np.ndarray) -> str:
    """Of ascending flat indices, as `mask_voxels` gives them."""
    return str(xxhash.xxh3_128_hexdigest(np.ascontiguousarray(voxels, dtype="<i8").data))


def mask_voxels(scan: Scan, mask_flat: np.ndarray | None) -> np.ndarray:
    """The mask as ascending (n,) int64, each voxel once; None: all voxels of the grid."""
    if mask_flat is None:
        return np.arange(scan.volume_voxels, dtype=np.int64)
    voxels = in_grid(scan, mask_flat, "mask")
    if not (voxels[1:] > voxels[:-1]).all():  # np.unique of a brain takes 0.2 s
        voxels = np.unique(voxels)
    if not voxels.size:
        raise InputError(f"the mask for {scan.path} is empty: no voxel is above 0; give another")
    return voxels


def in_grid(scan: Scan, flat: np.ndarray, what: str) -> np.ndarray:
    """``flat`` as (n,) int64, all inside the scan's grid."""
    flat = np.asarray(flat)
    if flat.ndim != 1 or (flat.size and flat.dtype.kind not in "iu"):
        raise InputError(
            f"{what} is {flat.dtype} {flat.shape}; give flat voxel indices, np.flatnonzero(mask)"
        )
    flat = flat.astype(np.int64, copy=False)
    if flat.size and not (flat.min() >= 0 and flat.max() < scan.volume_voxels):
        raise InputError(
            f"{what} names voxel {flat.max() if flat.min() >= 0 else flat.min()}, but "
            f"{scan.describe()} has voxels 0 to {scan.volume_voxels - 1}; it is of another grid"
        )
    return flat
