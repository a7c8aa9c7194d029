"""A whole scan as a NIfTI image over an array: in memory, mapped where it lies, or unpacked into a map.

The array holds what nilearn would see: raw values where there is no scaling, else raw * slope + inter
as float32, rounded once. Which of the three it is, is decided before reading.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from raypipe.errors import InputError
from raypipe.fmri.loader.decide import BLOCKS_BYTES, Placement, place
from raypipe.fmri.loader.mapped import MemoryMappedArray
from raypipe.memory.config import MemoryConfig
from raypipe.read.nifti import Scan
from raypipe.store.voxels import BLOCK_BYTES
from raypipe.store.voxels.reader import scale


def whole_dtype(scan: Scan) -> np.dtype[Any]:
    """Of the array: the scan's own in this machine's byte order, float32 where values are scaled."""
    return np.dtype(np.float32) if scan.scaled else scan.native


def lies_ready(scan: Scan) -> bool:
    """Whether the file's bytes are the array, as they lie."""
    return not scan.compressed and not scan.scaled


def place_whole(scan: Scan, config: MemoryConfig, room: int) -> Placement:
    """Where the scan goes. Raises MemoryBudgetExceeded."""
    size = scan.volume_voxels * scan.n_volumes * int(whole_dtype(scan).itemsize)
    # A block as stored, and the same scaled.
    block = 2 * max(BLOCK_BYTES, scan.volume_voxels * 8) + BLOCKS_BYTES
    mapped = 0 if lies_ready(scan) else block
    return place(
        scan.describe(), array_bytes=size, in_memory_bytes=size + block, mapped_bytes=mapped,
        config=config, room=room,
    )  # fmt: skip


def load_whole(
    scan: Scan, placement: Placement, new_file: Callable[[str], Path]
) -> tuple[Any, MemoryMappedArray | None]:
    """The image, and the temporary map it stands on, if there is one."""
    if not placement.mapped:
        values = np.empty((scan.n_volumes, scan.volume_voxels), whole_dtype(scan))
        _fill(scan, values)
        return image_of(scan, _grid(values, scan)), None
    if lies_ready(scan):
        return image_of(scan, _map_in_place(scan)), None
    mapped = MemoryMappedArray.create(
        new_file(scan.path.name), scan.shape, whole_dtype(scan), order="F"
    )
    try:
        _fill(scan, mapped.array.reshape(-1, order="F").reshape(scan.n_volumes, -1))
        return image_of(scan, mapped.array), mapped
    except BaseException:
        mapped.cleanup()
        raise


def image_of(scan: Scan, values: NDArray[Any]) -> Any:
    """``values`` (x, y, z, t) under the scan's own header: geometry, TR, units."""
    header = nibabel.load(scan.path).header.copy()
    header.set_data_dtype(values.dtype.newbyteorder("="))
    return nibabel.Nifti1Image(values, scan.affine, nibabel.Nifti1Header.from_header(header))


def _fill(scan: Scan, out: NDArray[Any]) -> None:
    """out : (t, z*y*x), x fastest: the file's own order."""
    for t0, block in scan.volumes(BLOCK_BYTES):
        out[t0 : t0 + len(block)] = scale(block, scan.slope, scan.inter, out.dtype)


def _grid(values: NDArray[Any], scan: Scan) -> NDArray[Any]:
    return values.reshape(-1).reshape(scan.shape, order="F")


def _map_in_place(scan: Scan) -> NDArray[Any]:
    scan.check_unchanged()
    if scan.size_bytes < scan.data_offset + scan.data_bytes:  # reading past the end is SIGBUS
        raise InputError(
            f"scan {scan.path} has {scan.size_bytes} of {scan.data_offset + scan.data_bytes} bytes; it "
            "is not whole: copy it again"
        )
    return np.memmap(scan.path, scan.dtype, "r", scan.data_offset, scan.shape, order="F")
