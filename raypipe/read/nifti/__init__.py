"""NIfTI scans -> arrays, streamed: ``.nii.gz``, ``.nii``, ``.hdr``/``.img`` pairs.

`open_scan` reads a header and gives a `Scan`, a picklable handle; its volumes come in blocks of
bounded size, in the file's own dtype, unscaled (slope and intercept stand beside them). Nothing
here holds a scan in memory. Keeping what was read is ``raypipe.store.voxels``. Start in `scan`.
"""

from __future__ import annotations

from raypipe.read.nifti.codec import Codec, find_codec
from raypipe.read.nifti.scan import Scan, file_positions, open_scan
from raypipe.read.nifti.slabs import SLAB_BYTES, Slab, slab_grid, slabs

__all__ = [
    "SLAB_BYTES",
    "Codec",
    "Scan",
    "Slab",
    "file_positions",
    "find_codec",
    "open_scan",
    "slab_grid",
    "slabs",
]
