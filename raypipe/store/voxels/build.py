"""Making an entry of the cache: claim, room, one pass, turn, and the name last.

The lock of the entry is held alone from the first step to the last, so a second process waits and
then reads; it never meets a half-built one, because the folder gets its name only when all of it is
on the disk. The first ROIs are answered by the pass itself: turning and flushing go on in a thread
behind them (`Pending`). The steps are `claim` and `making`.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from raypipe.errors import StoreLocked
from raypipe.read.nifti import Codec, Scan, find_codec
from raypipe.store.voxels.claim import Say, Wanted, claim
from raypipe.store.voxels.gather import gather_once
from raypipe.store.voxels.making import BuildLimits, Making
from raypipe.store.voxels.reader import VoxelStore

#: Memory of a build: two slabs in the pass (8 MiB), then four bands of 4 MiB in the turn. More was
#: not faster.
BLOCK_BYTES = 24 << 20


class Pending:
    """The first answers, and the entry that is being finished behind them.

    series : name -> (n, n_volumes) raw values, native byte order
    cached : whether they came from an entry that was there
    """

    def __init__(
        self, series: dict[str, np.ndarray], entry: VoxelStore | Future[VoxelStore] | None
    ) -> None:
        self.series, self._entry = series, entry
        self.cached = isinstance(entry, VoxelStore)

    def store(self) -> VoxelStore | None:
        """The entry, once it is whole; None when another process was building it.

        Raises what went wrong while it was finished (NoSpace, ...).
        """
        return self._entry.result() if isinstance(self._entry, Future) else self._entry


def build(
    scan: Scan,
    mask_flat: np.ndarray | None,
    cache_dir: Path,
    *,
    quota_bytes: int | None = None,
    block_bytes: int = BLOCK_BYTES,
    wait_s: float | None = None,
    codec: Codec | None = None,
    say: Say = print,
) -> VoxelStore:
    """The entry of ``scan`` under the mask (flat indices; None: every voxel), made if need be.

    Waits up to ``wait_s`` seconds (None: for ever) for another process that builds it, then raises
    StoreLocked. ``quota_bytes`` bounds all entries of ``cache_dir`` together.
    """
    limits = BuildLimits(quota_bytes=quota_bytes, block_bytes=block_bytes)
    wanted = Wanted.of(scan, mask_flat, cache_dir)
    found = claim(wanted, wait_s, say)
    if isinstance(found, VoxelStore):
        return found
    making = Making(wanted, found, limits, codec or find_codec(), say)
    making.gather({})
    return making.finish()


def build_and_gather(
    scan: Scan,
    mask_flat: np.ndarray | None,
    rois: Mapping[str, np.ndarray],
    cache_dir: Path,
    *,
    quota_bytes: int | None = None,
    block_bytes: int = BLOCK_BYTES,
    wait_s: float | None = None,
    codec: Codec | None = None,
    say: Say = print,
) -> Pending:
    """`build`, with the raw series of ``rois`` (name -> flat voxels) as soon as the pass ends.

    Where another process still builds the entry after ``wait_s``, one pass of our own answers and
    nothing is stored.
    """
    limits = BuildLimits(quota_bytes=quota_bytes, block_bytes=block_bytes)
    wanted = Wanted.of(scan, mask_flat, cache_dir)
    try:
        found = claim(wanted, wait_s, say)
    except StoreLocked as error:
        say(f"{error}: read in one pass of our own, nothing stored")
        return Pending(gather_once(scan, rois, codec=codec), None)
    if isinstance(found, VoxelStore):
        return Pending({name: found.read(flat) for name, flat in rois.items()}, found)
    making = Making(wanted, found, limits, codec or find_codec(), say)
    return Pending(making.gather(rois), _behind(making))


def _behind(making: Making) -> Future[VoxelStore]:
    """``making.finish`` in a thread, which the interpreter waits for when it ends."""
    thread = ThreadPoolExecutor(1, "raypipe-cache")
    future = thread.submit(making.finish)
    future.add_done_callback(making.report)
    thread.shutdown(wait=False)
    return future
