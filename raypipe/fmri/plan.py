"""How much memory each unit takes, and how units become work items that fit a worker's budget. Pure.

What a unit takes follows from headers, voxel counts and sample counts alone, so a run that cannot fit
is refused before a scan is read. Bytes are those that the budget counts: anonymous memory, not maps.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from raypipe.errors import MemoryBudgetExceeded
from raypipe.fmri.units import Unit
from raypipe.memory.config import MemoryConfig, ResolvedMemory
from raypipe.memory.policy import SMALLEST_BUDGET_BYTES, Limits
from raypipe.read.runfiles import RunFiles
from raypipe.runner import Machines
from raypipe.store.voxels import BLOCK_BYTES, Way, choose_way
from raypipe.store.voxels.decide import Reads
from raypipe.store.voxels.obtain import LIKELY_READS
from raypipe.units import format_bytes

# A worker with everything imported and its kernels compiled; with it predictions came out above what
# was measured (docs/fmri.md).
BASE_BYTES = 320 << 20
LESS = "take a smaller ROI, fewer --workers, or a larger --max-memory-per-process"


@dataclass(frozen=True, kw_only=True)
class ScanFacts:
    """A scan by its header. masked_voxels : of its brain mask, or of the grid; cached : unpacked."""

    name: str
    compressed: bool
    n_volumes: int
    itemsize: int
    grid_voxels: int
    masked_voxels: int
    cached: bool

    @property
    def data_bytes(self) -> int:
        """Bytes of all values, decompressed."""
        return self.grid_voxels * self.n_volumes * self.itemsize

    @property
    def entry_bytes(self) -> int:
        """Bytes of its entry in the cache."""
        return self.masked_voxels * (self.n_volumes * self.itemsize + 8)


@dataclass(frozen=True, kw_only=True)
class UnitFacts:
    """Samples and folds of a unit; keeps_folds : its model holds every fold's patterns at once; n_maps : of
    its weights, at most; solver_rows : float64 rows that a fit takes beside the patterns; solver_squares :
    float64 matrices of voxels x voxels that it takes.
    """

    n_samples: int = 0
    n_folds: int = 0
    keeps_folds: bool = False
    n_maps: int = 0
    solver_rows: int = 0
    solver_squares: int = 0


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of one ROI of one subject.

    held    : from its reading until its units are done; 0 when mapped
    reading : besides, while its scans are read and cleaned; working : besides, while it is decoded
    """

    held: int
    reading: int
    working: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A work item: units of one subject, whose ROIs are read together, ``at_once`` at a time."""

    subject: str
    number: int
    runs: tuple[RunFiles, ...]
    units: tuple[Unit, ...]
    mapped: frozenset[str]
    at_once: int
    need_bytes: int

    @property
    def key(self) -> tuple[str, int]:
        return (self.subject, self.number)

    @property
    def rois(self) -> tuple[str, ...]:
        """Its ROIs, each once."""
        return tuple(dict.fromkeys(unit.roi for unit in self.units))

    def again(self) -> Batch:
        """The same units; those that are recorded as done are not computed again."""
        return self

    def with_less_memory(self) -> Batch:
        """With half the ROIs at once. Raises MemoryBudgetExceeded at one."""
        if self.at_once == 1:
            raise MemoryBudgetExceeded(
                f"a worker ran out of memory with one ROI of subject {self.subject} "
                f"({', '.join(self.rois)}); {LESS}"
            )
        return replace(self, at_once=(self.at_once + 1) // 2)

    def at_most(self, other: Batch) -> Batch:
        """No more ROIs at once than ``other``, if that was cut down itself."""
        return replace(self, at_once=min(self.at_once, max(1, other.at_once)))


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What memory allows, made before reading. workers : processes; cores : of each; limit_bytes : of
    each, the mark at which it is told to take less."""

    workers: int
    cores: float
    budget_bytes: int
    limit_bytes: int
    config: MemoryConfig

    def line(self, need_bytes: int) -> str:
        """For people."""
        config = self.config
        use = (
            f"series from {format_bytes(config.threshold_bytes)} on are mapped"
            if config.use_memmap
            else "nothing is mapped"
        )
        return (
            f"memory: {self.workers} worker(s) of {format_bytes(self.budget_bytes)}, "
            f"{config.available_memory_buffer:.0%} of the node left alone; {use}; predicted peak of a "
            f"worker {format_bytes(need_bytes)}, it takes less from {format_bytes(self.limit_bytes)} on"
        )


def is_mapped(config: MemoryConfig, n_bytes: int) -> bool:
    """Whether a cleaned series of this size is kept in a mapped file instead of in memory."""
    return config.use_memmap and n_bytes >= config.threshold_bytes


def series_bytes(voxels: int, scans: Sequence[ScanFacts]) -> int:
    """Of a cleaned series over all scans, float32."""
    return 4 * voxels * sum(scan.n_volumes for scan in scans)


def need_of(
    voxels: int, scans: Sequence[ScanFacts], units: Sequence[UnitFacts], *, mapped: bool
) -> Need:
    """What an ROI of ``voxels`` takes. units : of that ROI; none for series that are only written."""
    longest = max(scan.n_volumes * scan.itemsize for scan in scans)
    most = max(scan.n_volumes for scan in scans)
    # The raw rows of one scan and 16 volumes of them in the file's order; then scaled, then cleaned.
    reading = voxels * (longest + 16 * max(scan.itemsize for scan in scans) + 2 * 4 * most + 8)
    held = 0 if mapped or not units else series_bytes(voxels, scans)
    return Need(
        held=held,
        reading=reading,
        working=max(map(_working, units, [voxels] * len(units)), default=0),
    )


def _working(unit: UnitFacts, voxels: int) -> int:
    """float64 patterns, a fold's scaled training and test copies with one more in the making, and what
    folds keep: Gram matrices, or their patterns; and what a solver takes. Weight maps are made before the
    folds, of copies as a fold's; they stay, weights and patterns, and are spread over all voxels.
    """
    patterns = 8 * unit.n_samples * voxels
    kept = patterns if unit.keeps_folds else 2 * 8 * unit.n_samples**2
    maps = 4 * 8 * unit.n_maps * voxels
    solver = 8 * voxels * (unit.solver_rows + unit.solver_squares * voxels)
    return 4 * patterns + unit.n_folds * kept + maps + solver


def peak_bytes(needs: Sequence[Need]) -> int:
    """A worker's peak with these ROIs at once."""
    held = sum(need.held for need in needs)
    reading = sum(need.reading for need in needs)
    working = max((need.working for need in needs), default=0)
    return BASE_BYTES + BLOCK_BYTES + held + max(reading, working)


def pack(needs: Mapping[str, Need], limit_bytes: int) -> list[tuple[str, ...]]:
    """ROIs in groups that fit, in order; raises MemoryBudgetExceeded for one that does not fit alone."""
    groups: list[tuple[str, ...]] = []
    now: tuple[str, ...] = ()
    for roi, need in needs.items():
        alone = peak_bytes([need])
        if alone > limit_bytes:
            raise MemoryBudgetExceeded(
                f"ROI {roi} needs {format_bytes(alone)} in one worker, which may take "
                f"{format_bytes(limit_bytes)}; {LESS}"
            )
        if now and peak_bytes([needs[name] for name in (*now, roi)]) > limit_bytes:
            groups.append(now)
            now = ()
        now = (*now, roi)
    return [*groups, now] if now else groups


def way_of(scan: ScanFacts, voxels: int, *, may_store: bool, may_map: bool) -> Way:
    """How ``scan`` will be read: what ``store.voxels.obtain`` decides of the same facts."""
    return choose_way(
        compressed=scan.compressed,
        data_bytes=scan.data_bytes,
        entry_bytes=scan.masked_voxels * scan.n_volumes * scan.itemsize,
        n_volumes=scan.n_volumes,
        itemsize=scan.itemsize,
        reads=Reads(voxels=voxels, times=LIKELY_READS if may_store else 1),
        cached=scan.cached,
        may_store=may_store,
        may_map=may_map,
    )


def decide(
    memory: ResolvedMemory,
    *,
    machines: Machines,
    asked: int | None,
    n_units: int,
    largest_bytes: int,
) -> Decision:
    """As many workers as cores, units and memory allow, or the number asked for.

    largest_bytes : of the unit that takes most. Raises MemoryBudgetExceeded when it fits no worker.
    """
    most = asked or max(1, min(machines.places(1.0), n_units))
    for workers in [asked] if asked else range(most, 0, -1):
        found = _decision(memory, workers, machines)
        if found is not None and largest_bytes <= found.limit_bytes:
            return found
    last = _decision(memory, asked or 1, machines)
    may = format_bytes(last.limit_bytes) if last else "less than the smallest budget"
    raise MemoryBudgetExceeded(
        f"the largest unit needs {format_bytes(largest_bytes)} in one worker; {asked or 1} worker(s) "
        f"may take {may} each; {LESS}"
    )


def _decision(memory: ResolvedMemory, workers: int, machines: Machines) -> Decision | None:
    """Workers that may meet on one machine share its memory; a cluster's are taken to be like this one,
    and each worker looks at its own when it starts."""
    cores = machines.cores_for(workers)
    share = memory.config.capacity_bytes(memory.limits) // machines.together(workers, cores)
    budget = min(memory.config.budget_bytes, share)
    if budget < SMALLEST_BUDGET_BYTES:
        return None
    return Decision(
        workers=workers,
        cores=cores,
        budget_bytes=budget,
        limit_bytes=Limits.of(budget).soft_bytes,
        config=memory.config,
    )


def split(units: Sequence[Unit], parts: int) -> list[tuple[Unit, ...]]:
    """``units`` in at most ``parts`` runs of nearly equal length, none empty, order kept."""
    parts = max(1, min(parts, len(units)))
    edges = [len(units) * part // parts for part in range(parts + 1)]
    return [tuple(units[a:b]) for a, b in pairwise(edges)]


def in_order(lists: Sequence[Sequence[Batch]], streamed: Collection[str]) -> list[Batch]:
    """The first item of each subject that is ``streamed``, so that workers unpack different scans; then
    the rest subject by subject, whose masks and pages are then at hand.
    """
    heads = [batches[0] for batches in lists if batches and batches[0].subject in streamed]
    first = {one.key for one in heads}
    rest = [one for batches in lists for one in batches if one.key not in first]
    return [*heads, *rest]


def parts_of(n_units: int, *, streamed: bool, may_store: bool, workers: int, subjects: int) -> int:
    """In how many items a subject's units are handed out.

    From the cache each is an item of its own. A scan that is streamed is read once an item: one item,
    or, when the cache will have it, as many as keep all workers busy.
    """
    if not streamed:
        return n_units
    return math.ceil(workers / max(1, subjects)) if may_store else 1
