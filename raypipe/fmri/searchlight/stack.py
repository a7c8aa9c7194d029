"""All subjects' maps side by side on the disk, so that a block of centres can be taken of all at once.

A map is a compressed volume: to see one centre it is unpacked whole. So each is unpacked once, its values
appended to a file in the run folder that has no name (the kernel frees it with its last user), and blocks
of centres are read from there. In memory are one map, a flag a voxel, and one block.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

from raypipe.errors import InputError
from raypipe.fmri.masks import Voxels
from raypipe.store.checksum import read_full
from raypipe.store.durable import pwrite_all
from raypipe.store.space import explain_os_errors, preallocate

Floats = NDArray[np.float64]

# Of a block's values as float64, and the three copies that tests make of them.
BLOCK_BYTES = 32 << 20


# A score at a chance of 1/3 is 1e-8 off it as float32, in all subjects on the same side.
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False, kw_only=True)
class Stack:
    """Maps of subjects. centres : (n,) flat indices that all have, ascending; fd : the file.

    place : (n,) where the centres stand in a subject's row; width : values of a row, float32
    """

    fd: int
    centres: Voxels
    place: Voxels
    width: int
    chances: tuple[float, ...]
    block_bytes: int

    @property
    def n_subjects(self) -> int:
        """Rows of the file."""
        return len(self.chances)

    def blocks(self) -> Iterator[Floats]:
        """Yield (n_subjects, some) scores less chance: all centres, in their order."""
        step = max(1, self.block_bytes // (4 * 8 * self.n_subjects))
        for lo in range(0, len(self.centres), step):
            yield self._block(self.place[lo : lo + step])

    def _block(self, place: Voxels) -> Floats:
        first, last = int(place[0]), int(place[-1]) + 1  # ascending: one stretch of each row
        above = np.empty((self.n_subjects, len(place)))
        row = np.empty(last - first, np.float32)
        for number, chance in enumerate(self.chances):
            at = 4 * (number * self.width + first)
            if read_full(self.fd, row.view(np.uint8).data, at) < row.nbytes:
                raise InputError(f"the maps' file ends before byte {at + row.nbytes}; run again")
            np.subtract(row[place - first], chance, out=above[number], dtype=np.float64)
        above[np.abs(above) < _ROUNDING] = 0.0
        return above


@contextmanager
def stacked(
    files: Sequence[Path],
    chances: Sequence[float],
    *,
    scratch: Path,
    block_bytes: int,
) -> Iterator[Stack]:
    """Maps of one grid, NaN where there is no score. chances : one a map; scratch : a folder with room.

    Raises NoSpace when they do not fit there: 4 bytes a subject and voxel of the first one's map.
    """
    first = _values(files[0])
    voxels = np.flatnonzero(np.isfinite(first)).astype(np.int64)
    del first
    with tempfile.TemporaryFile(dir=scratch) as file:
        place = voxels[:0]
        if voxels.size:
            place = _append_all(file.fileno(), files, voxels, scratch)
        yield Stack(
            fd=file.fileno(),
            centres=voxels[place],
            place=place,
            width=voxels.size,
            chances=tuple(chances),
            block_bytes=block_bytes,
        )


def _append_all(fd: int, files: Sequence[Path], voxels: Voxels, scratch: Path) -> Voxels:
    """Write each map's ``voxels`` as a row; where in a row all maps have a score."""
    inside, size = np.ones(voxels.size, bool), 4 * voxels.size * len(files)
    with explain_os_errors(scratch, size):
        preallocate(fd, scratch, size)
        for number, path in enumerate(files):
            own = _values(path)[voxels]
            inside &= np.isfinite(own)
            pwrite_all(fd, own.view(np.uint8).data, number * own.nbytes)
    return np.flatnonzero(inside).astype(np.int64)


def _values(path: Path) -> NDArray[np.float32]:
    """(x*y*z,) of a map."""
    return np.asarray(nibabel.load(path).dataobj, np.float32).ravel()
