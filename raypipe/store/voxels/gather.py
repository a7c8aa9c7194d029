"""ROIs out of a scan without a cache: in one streamed pass, or in place from a plain ``.nii``.

Both give (n_voxels, n_volumes) raw values, voxels in the order asked for. `Picker` is also what
`spool` takes the brain's voxels with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from raypipe.errors import InputError
from raypipe.read.nifti import SLAB_BYTES, Codec, Scan, Slab, file_positions, slabs
from raypipe.store.voxels.entry import in_grid

# Volumes kept before they are turned: 16 float32 fill a cache line of each voxel's series.
_STAGE_VOLUMES = 16


class Picker:
    """Takes the same voxels out of every volume.

    flat : (n,) C-order indices, in the order wanted
    """

    def __init__(self, scan: Scan, flat: np.ndarray) -> None:
        self._places = file_positions(flat, scan.shape)
        self._voxels = scan.volume_voxels
        self._row = np.empty(flat.size, scan.dtype)
        self._order: np.ndarray | None = None

    def rows(self, slab: Slab) -> Iterator[tuple[int, np.ndarray]]:
        """(t, (n,) values in stored dtype) of each volume that ``slab`` completes.

        An array is good until the next one is asked for.
        """
        if slab.values.shape[1] == self._voxels:
            for t, volume in enumerate(slab.values, slab.t0):
                # "clip" skips a copy that "raise" makes; the places were checked against the grid.
                yield t, np.take(volume, self._places, out=self._row, mode="clip")
            return
        self._take_part(slab)
        if slab.p0 + slab.values.shape[1] == self._voxels:
            yield slab.t0, self._row

    def _take_part(self, slab: Slab) -> None:
        if self._order is None:
            self._order = np.argsort(self._places, kind="stable")
            self._ascending = self._places[self._order]
        p1 = slab.p0 + slab.values.shape[1]
        lo, hi = np.searchsorted(self._ascending, (slab.p0, p1))
        self._row[self._order[lo:hi]] = slab.values[0][self._ascending[lo:hi] - slab.p0]


class Gather:
    """One ROI's series, filled volume by volume: ``series`` (n, n_volumes), native byte order."""

    def __init__(self, scan: Scan, flat: np.ndarray) -> None:
        self._picker = Picker(scan, flat)
        self.series = np.empty((flat.size, scan.n_volumes), scan.native)
        self._stage = np.empty((min(_STAGE_VOLUMES, scan.n_volumes), flat.size), scan.native)
        self._staged = 0

    def take(self, slab: Slab) -> None:
        """Add what ``slab`` holds."""
        for t, row in self._picker.rows(slab):
            self._stage[self._staged] = row
            self._staged += 1
            if self._staged == len(self._stage) or t == self.series.shape[1] - 1:
                self.series[:, t + 1 - self._staged : t + 1] = self._stage[: self._staged].T
                self._staged = 0


def gathers(scan: Scan, rois: Mapping[str, np.ndarray]) -> dict[str, Gather]:
    """A `Gather` for each of ``rois``; InputError for voxels outside the grid."""
    return {name: Gather(scan, in_grid(scan, flat, name)) for name, flat in rois.items()}


def gather_once(
    scan: Scan,
    rois: Mapping[str, np.ndarray],
    *,
    slab_bytes: int = SLAB_BYTES,
    codec: Codec | None = None,
) -> dict[str, np.ndarray]:
    """The raw series of all ``rois`` (name -> flat voxels) in one pass; nothing is stored."""
    taking = gathers(scan, rois)
    for slab in slabs(scan, slab_bytes, codec):
        for gather in taking.values():
            gather.take(slab)
    return {name: gather.series for name, gather in taking.items()}


def read_in_place(scan: Scan, flat: np.ndarray) -> np.ndarray:
    """The raw series (n, n_volumes) of ``flat`` from an uncompressed scan, through a map."""
    if scan.compressed:
        raise InputError(f"scan {scan.path} is compressed: it cannot be read in place")
    flat = in_grid(scan, flat, "roi")
    scan.check_unchanged()
    if scan.size_bytes < scan.data_offset + scan.data_bytes:  # a map of it would be SIGBUS
        raise InputError(
            f"scan {scan.path} has {scan.size_bytes} of "
            f"{scan.data_offset + scan.data_bytes} bytes; it is not whole: copy it again"
        )
    shape = (scan.n_volumes, scan.volume_voxels)
    values = np.memmap(scan.path, scan.dtype, "r", scan.data_offset, shape)
    gather = Gather(scan, flat)
    for t in range(scan.n_volumes):
        gather.take(Slab(t0=t, p0=0, values=values[t : t + 1]))
    return gather.series
