"""The voxel-major cache of scans: any voxel's whole time series is one run of bytes on the disk.

A ``.nii.gz`` is decompressed once, in one streamed pass that also answers the first ROIs
(`build_and_gather`); every ROI after it is a short read (`VoxelStore`). Entries are raw, in the
scan's own dtype; slope and intercept stand in the manifest. `obtain` chooses between the cache,
one pass that stores nothing, and reading a plain ``.nii`` in place, and says which. Files and their
names: `entry`. Order of all steps: `build`.
"""

from __future__ import annotations

from raypipe.store.voxels.build import BLOCK_BYTES, Pending, build, build_and_gather
from raypipe.store.voxels.decide import Way, choose_way
from raypipe.store.voxels.entry import EntryPaths, entry_key, mask_hash
from raypipe.store.voxels.gather import gather_once, read_in_place
from raypipe.store.voxels.obtain import Series, find, obtain
from raypipe.store.voxels.plan import ReadPlan, read_plan
from raypipe.store.voxels.reader import VoxelStore

__all__ = [
    "BLOCK_BYTES",
    "EntryPaths",
    "Pending",
    "ReadPlan",
    "Series",
    "VoxelStore",
    "Way",
    "build",
    "build_and_gather",
    "choose_way",
    "entry_key",
    "find",
    "gather_once",
    "mask_hash",
    "obtain",
    "read_in_place",
    "read_plan",
]
