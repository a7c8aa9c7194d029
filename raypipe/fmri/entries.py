"""A scan opened for many reads of few voxels: its entry in the cache, or a plain file read in place.

For what reads a scan block by block (searchlights, models). What reads each region once is ``series``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from raypipe.fmri.config import FmriConfig
from raypipe.fmri.masks import Voxels
from raypipe.fmri.sources import Series, SeriesSource, StoredSeries
from raypipe.read.nifti import Scan
from raypipe.store.voxels import VoxelStore, build, obtain, read_in_place
from raypipe.store.voxels.reader import scale


def open_entry(
    cfg: FmriConfig,
    scan: Scan,
    brain: Voxels | None,
    voxels: Voxels,
    *,
    reads: int,
    use_memmap: bool = True,
    say: Callable[[str], None] = print,
) -> tuple[VoxelStore | None, str]:
    """(the scan's entry, found or built, or None where it is better read in place; how, in a word).

    voxels : what is going to be read; reads : in how many pieces
    """
    folder = cfg.cache_folder()
    first = obtain(
        scan,
        {"first": voxels[:1]},
        mask_flat=brain,
        cache_dir=folder,
        quota_bytes=cfg.quota_bytes(),
        expected_reads=reads,
        use_memmap=use_memmap,
        say=say,
    )
    store = None if first.pending is None else first.pending.store()
    if store is None and first.way.name != "in place" and folder is not None:
        store = build(scan, brain, folder, quota_bytes=cfg.quota_bytes(), say=say)
    return store, first.way.name


@dataclass(frozen=True, eq=False, kw_only=True)
class InPlace:
    """Voxels of a plain .nii, read where it lies; a ``sources.SeriesSource``."""

    scan: Scan
    voxels: Voxels

    @property
    def n_volumes(self) -> int:
        """Volumes of the scan."""
        return self.scan.n_volumes

    def read(self, voxels: Voxels) -> Series:
        """(n, n_volumes) float32."""
        return scale(read_in_place(self.scan, voxels), self.scan.slope, self.scan.inter)


def source_over(scan: Scan, store: VoxelStore | None, voxels: Voxels) -> SeriesSource:
    """Where models and searchlights read ``voxels`` of ``scan``."""
    if store is None:
        return InPlace(scan=scan, voxels=voxels)
    return StoredSeries(store=store, chosen=voxels)
