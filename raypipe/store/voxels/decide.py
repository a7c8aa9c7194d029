"""From where to read ROIs: the cache, the ``.nii`` in place, or one pass that stores nothing. Pure.

Times are estimates by rates measured on one machine (page cache warm, processor time of scans of
91x109x91x320); only their order counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raypipe.units import format_seconds

#: Of a pass, bytes of the whole scan a second: unpacked by isal (zlib: half of it), and plain.
UNPACK_BYTES_S = 800e6
PASS_BYTES_S = 1600e6
#: Opening a stream and its thread.
PASS_START_S = 5e-3
#: Of an entry written: spool, turn and flush, bytes of the entry a second.
BUILD_BYTES_S = 400e6
#: In place: values a second (43 million of a ROI of 5,000 voxels, 70 of one of 100,000), and what
#: each volume costs besides.
PICK_VALUES_S = 50e6
PICK_VOLUME_S = 40e-6
#: An entry gives this many bytes a second.
READ_BYTES_S = 2e9


@dataclass(frozen=True, kw_only=True)
class Way:
    """The decision. seconds: expected until the first answer; why: one line, to be printed."""

    name: Literal["cached", "build", "in place", "one pass"]
    seconds: float
    why: str


@dataclass(frozen=True, kw_only=True)
class Reads:
    """What will be asked of a scan: ``times`` ROIs of ``voxels`` in all it is used."""

    voxels: int
    times: int = 1


def choose_way(
    *,
    compressed: bool,
    data_bytes: int,
    entry_bytes: int,
    n_volumes: int,
    itemsize: int,
    reads: Reads,
    cached: bool,
    may_store: bool,
    may_map: bool = True,
) -> Way:
    """The way of least time over all of ``reads``; ``may_store`` False: nothing is written;
    ``may_map`` False: no file is read through a map, as in place is.

    data_bytes : of the scan, decompressed; entry_bytes: of the entry that is or would be made
    """
    one_read = reads.voxels * n_volumes * itemsize / READ_BYTES_S
    if cached:
        return Way(name="cached", seconds=one_read, why="the cache has it")
    one_pass = PASS_START_S + data_bytes / (UNPACK_BYTES_S if compressed else PASS_BYTES_S)
    picking = reads.voxels * n_volumes / PICK_VALUES_S + n_volumes * PICK_VOLUME_S
    ways = [_way("one pass", one_pass, one_pass * reads.times, reads)]
    if not compressed and may_map:
        ways.append(_way("in place", picking, picking * reads.times, reads))
    if may_store:
        in_all = one_pass + entry_bytes / BUILD_BYTES_S + one_read * (reads.times - 1)
        ways.append(_way("build", one_pass, in_all, reads))
    return min(ways, key=lambda pair: pair[0])[1]


def _way(
    name: Literal["build", "in place", "one pass"], first: float, total: float, reads: Reads
) -> tuple[float, Way]:
    why = (
        f"about {format_seconds(total)} in all for {reads.times} ROIs of {reads.voxels} voxels, "
        f"the first after {format_seconds(first)}"
    )
    return total, Way(name=name, seconds=first, why=why)
