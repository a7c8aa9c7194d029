"""ROIs of a scan from wherever they come soonest; what was chosen is said before it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raypipe.read.nifti import Codec, Scan, find_codec
from raypipe.store.voxels.build import BLOCK_BYTES, Pending, build_and_gather
from raypipe.store.voxels.claim import Say, Wanted, look
from raypipe.store.voxels.decide import Reads, Way, choose_way
from raypipe.store.voxels.gather import gather_once, read_in_place
from raypipe.store.voxels.reader import VoxelStore, scale

#: ROIs a scan is likely to be asked for, where the caller does not know: an atlas of a few dozen.
LIKELY_READS = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """Raw series by name, (n, n_volumes); ``pending`` where an entry is there or in the making."""

    raw: dict[str, np.ndarray]
    slope: float
    inter: float
    way: Way
    pending: Pending | None

    def scaled(self, name: str) -> np.ndarray:
        """(n, n_volumes) float32, raw * slope + inter."""
        return scale(self.raw[name], self.slope, self.inter)


def find(
    scan: Scan, mask_flat: np.ndarray | None, cache_dir: Path, say: Say = print
) -> VoxelStore | None:
    """The entry of ``scan`` under the mask, if there is one; nothing is built."""
    return look(Wanted.of(scan, mask_flat, cache_dir), say)


def obtain(
    scan: Scan,
    rois: Mapping[str, np.ndarray],
    *,
    mask_flat: np.ndarray | None = None,
    cache_dir: Path | None = None,
    quota_bytes: int | None = None,
    block_bytes: int = BLOCK_BYTES,
    wait_s: float | None = None,
    expected_reads: int = LIKELY_READS,
    use_memmap: bool = True,
    codec: Codec | None = None,
    say: Say = print,
) -> Series:
    """The raw series of ``rois`` (name -> flat voxels).

    cache_dir      : None: nothing is stored (``--no-cache``)
    expected_reads : ROIs asked for after these, too: whether an entry pays
    use_memmap     : False: nothing is read through a map
    """
    codec = codec or find_codec()
    found = find(scan, mask_flat, cache_dir, say) if cache_dir is not None else None
    masked = scan.volume_voxels if mask_flat is None else int(np.asarray(mask_flat).size)
    way = choose_way(
        compressed=scan.compressed,
        data_bytes=scan.data_bytes,
        entry_bytes=masked * scan.n_volumes * scan.dtype.itemsize,
        n_volumes=scan.n_volumes,
        itemsize=scan.dtype.itemsize,
        reads=Reads(
            voxels=sum(int(np.asarray(flat).size) for flat in rois.values()),
            times=max(1, expected_reads if cache_dir is not None else 1),
        ),
        cached=found is not None,
        may_store=cache_dir is not None,
        may_map=use_memmap,
    )
    unpacking = f", unpacked by {codec.name}" if scan.compressed and not found else ""
    say(f"{scan.describe()}: {way.name}{unpacking} ({way.why})")
    pending = None
    if found is not None:
        raw = {name: found.read(flat, use_memmap=use_memmap) for name, flat in rois.items()}
        pending = Pending(raw, found)
    elif way.name == "build" and cache_dir is not None:
        pending = build_and_gather(
            scan,
            mask_flat,
            rois,
            cache_dir,
            quota_bytes=quota_bytes,
            block_bytes=block_bytes,
            wait_s=wait_s,
            codec=codec,
            say=say,
        )
        raw = pending.series
    elif way.name == "in place":
        raw = {name: read_in_place(scan, flat) for name, flat in rois.items()}
    else:
        raw = gather_once(scan, rois, codec=codec)
    return Series(raw=raw, slope=scan.slope, inter=scan.inter, way=way, pending=pending)
