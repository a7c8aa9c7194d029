"""Into memory or into a map: decided from sizes and the memory options alone, before reading. Pure.

An array is mapped from ``memmap_threshold_gb`` on, and below it when it does not fit into what this
process may still take; where mapping is off, what does not fit is refused. What a step needs besides
the array (blocks being read, cleaned) must fit in any case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raypipe.errors import MemoryBudgetExceeded
from raypipe.memory.config import MemoryConfig
from raypipe.store.voxels import BLOCK_BYTES
from raypipe.units import format_bytes

#: Besides arrays: blocks of a pass or a build, and of cleaning.
BLOCKS_BYTES = BLOCK_BYTES + (16 << 20)
#: Of each voxel of an ROI: its index, its row in the cache and in order, and its means.
VOXEL_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The decision. array_bytes : of the result; need_bytes : of anonymous memory at the peak."""

    name: Literal["memory", "map"]
    array_bytes: int
    need_bytes: int
    why: str

    @property
    def mapped(self) -> bool:
        """Whether the array lives in a file."""
        return self.name == "map"

    def line(self, what: str) -> str:
        """One line, to be printed."""
        into = "a mapped temporary file" if self.mapped else "memory"
        return (
            f"{what}: {format_bytes(self.array_bytes)} into {into}, {format_bytes(self.need_bytes)} of "
            f"memory at the peak ({self.why})"
        )


def room_bytes(
    config: MemoryConfig, *, limit_bytes: int, available_bytes: int, charge_bytes: int
) -> int:
    """What this process may still take: of its budget, and of the node with its buffer kept."""
    buffer = round(limit_bytes * config.available_memory_buffer)
    return max(0, min(config.budget_bytes - charge_bytes, available_bytes - buffer))


def place(
    what: str, *, array_bytes: int, in_memory_bytes: int, mapped_bytes: int, config: MemoryConfig,
    room: int,
) -> Placement:  # fmt: skip
    """Where an array of ``array_bytes`` goes.

    in_memory_bytes, mapped_bytes : anonymous memory at the peak of either way
    Raises MemoryBudgetExceeded when neither way that is allowed fits into ``room``.
    """
    large = array_bytes >= config.threshold_bytes
    if not (config.use_memmap and (large or in_memory_bytes > room)):
        _check(what, in_memory_bytes, room, mapping_is_off=not config.use_memmap)
        why = (
            f"below the threshold of {format_bytes(config.threshold_bytes)}, {format_bytes(room)} left"
            if config.use_memmap
            else f"use_memmap is off, {format_bytes(room)} left"
        )
        return Placement(
            name="memory", array_bytes=array_bytes, need_bytes=in_memory_bytes, why=why
        )
    _check(what, mapped_bytes, room, mapping_is_off=False)
    why = (
        f"from {format_bytes(config.threshold_bytes)} on arrays are mapped"
        if large
        else f"in memory it would take {format_bytes(in_memory_bytes)}, {format_bytes(room)} are left"
    )
    return Placement(name="map", array_bytes=array_bytes, need_bytes=mapped_bytes, why=why)


def _check(what: str, need: int, room: int, *, mapping_is_off: bool) -> None:
    if need <= room:
        return
    step = "set use_memmap" if mapping_is_off else "give fewer voxels or a larger budget"
    raise MemoryBudgetExceeded(
        f"{what} needs {format_bytes(need)} of memory, {format_bytes(room)} are left of the budget and "
        f"of the node; {step}"
    )


def series_bytes(n_voxels: int, n_volumes: list[int], itemsize: int) -> tuple[int, int, int]:
    """(array, in memory, mapped) bytes of an ROI's cleaned series, of runs read one after another.

    itemsize : of the raw values
    """
    array = 4 * n_voxels * sum(n_volumes)
    # Raw rows of one run, 16 volumes of them in the file's order, and the same scaled.
    one_run = n_voxels * ((max(n_volumes) + 16) * itemsize + 4 * max(n_volumes))
    besides = BLOCKS_BYTES + VOXEL_BYTES * n_voxels
    return array, array + one_run + besides, besides
