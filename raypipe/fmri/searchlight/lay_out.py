"""From options to a plan of searchlights: maps that are done left out, the rest cut into blocks.

Headers, masks and labels are looked at, no scan is read; what the work takes in memory and disk is known
before. Blocks that are on the disk are found again by their keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from raypipe.errors import InputError
from raypipe.fmri.config import FmriConfig
from raypipe.fmri.inputs import SubjectInputs, check_alike, look_at, one_line, subjects_of
from raypipe.fmri.ledger import Ledger
from raypipe.fmri.masks import Grid
from raypipe.fmri.plan import BASE_BYTES, ScanFacts, UnitFacts, decide, way_of
from raypipe.fmri.planned import Planned, disk_line
from raypipe.fmri.prepare import LOOKING
from raypipe.fmri.rois import wanted_rois
from raypipe.fmri.searchlight.blockfile import block_key, block_path, key_of, load_block
from raypipe.fmri.searchlight.items import LightItem
from raypipe.fmri.searchlight.job import SearchlightJobConfig
from raypipe.fmri.searchlight.plan import SearchlightPlan, largest_bytes, plan_searchlight
from raypipe.fmri.searchlight.runs import sphere_voxels_of
from raypipe.fmri.series import Subject
from raypipe.fmri.units import RoiSpec, Unit, check_distinct
from raypipe.memory.config import ResolvedMemory
from raypipe.read.runfiles import RunFiles
from raypipe.runner import Machines
from raypipe.store.voxels import BLOCK_BYTES
from raypipe.units import format_seconds

_TIMED = 50  # finished blocks that a time is told by


@dataclass(frozen=True, eq=False, kw_only=True)
class Light:
    """A map to be made. items : all its blocks; done : numbers of those on the disk.

    need_bytes : of a worker at its largest block
    """

    unit: Unit
    runs: tuple[RunFiles, ...]
    plan: SearchlightPlan
    items: tuple[LightItem, ...]
    done: frozenset[int]
    need_bytes: int

    @property
    def left(self) -> list[LightItem]:
        """Blocks still to be scored."""
        return [item for item in self.items if item.number not in self.done]


@dataclass(frozen=True, eq=False, kw_only=True)
class LightPlan(Planned):
    """Maps. lights : those that are not done; batches : their blocks, in order."""

    lights: tuple[Light, ...]
    batches: tuple[LightItem, ...]


def lay_out(cfg: FmriConfig, memory: ResolvedMemory, machines: Machines) -> LightPlan:
    """Look at all inputs of ``cfg`` (absolute paths) and decide.

    Raises InputError when no map at all can be made, MemoryBudgetExceeded for a sphere that fits no
    worker.
    """
    if not isinstance(cfg, SearchlightJobConfig):
        raise TypeError(f"{type(cfg).__name__} is no SearchlightJobConfig")
    rois = wanted_rois(cfg)
    ledger = Ledger(cfg.run_dir)
    with ThreadPoolExecutor(LOOKING) as threads:
        found = threads.map(lambda name: _look(cfg, name, rois, ledger), subjects_of(cfg))
        subjects, lights = zip(*found, strict=True)
    check_alike(cfg, subjects)
    plan = LightPlan(
        subjects=subjects,
        rois=rois,
        done=tuple(unit for one in subjects for unit, _ in one.units if ledger.is_done(unit)),
        lights=tuple(light for of in lights for light in of),
        batches=(),
        decision=None,
        cache_bytes=sum(_cache_bytes(cfg, *both) for both in zip(subjects, lights, strict=True)),
        output_bytes=sum(_output_bytes(cfg, light) for of in lights for light in of),
    )
    check_distinct([*plan.units, *(unit for unit, _ in plan.failed)])
    if not plan.units:
        raise InputError(f"none of {len(plan.failed)} maps can be made: {plan.failed[0][1]}")
    left = [light for light in plan.lights if light.left]
    if left:
        decision = decide(
            memory,
            machines=machines,
            asked=cfg.workers,
            n_units=sum(len(light.left) for light in left),
            largest_bytes=max(light.need_bytes for light in left),
        )
        plan = replace(plan, decision=decision, batches=tuple(_in_order(left)))
    return replace(plan, lines=tuple(_lines(cfg, plan)))


def seconds_left(cfg: FmriConfig, plan: LightPlan) -> str:
    """How long the rest will take, by finished blocks of this run; said when there is none."""
    if plan.decision is None:
        return "time: nothing is left to compute"
    done = [
        block_path(cfg.run_dir, light.unit, number)
        for light in plan.lights
        for number in sorted(light.done)
    ]
    known = [load_block(path) for path in done[:: max(1, len(done) // _TIMED)]]
    if not known:
        return "time: not measured yet, no block of this run is finished"
    each = sum(block.seconds for block in known) / sum(len(b.scores.centres) for b in known)
    centres = sum(len(item.centres) for item in plan.batches)
    seconds = each * centres / plan.decision.workers
    return f"time: about {format_seconds(seconds)} by {len(known)} finished blocks"


def _look(
    cfg: SearchlightJobConfig, name: str, rois: Sequence[RoiSpec], ledger: Ledger
) -> tuple[SubjectInputs, list[Light]]:
    """One subject: what there is, and the maps that are not done, cut into blocks."""
    found = look_at(cfg, name, rois, cfg.targets())
    units = tuple((replace(u, key=cfg.map_key(u.key)), facts) for u, facts in found.units)
    found = replace(found, units=units)
    left = [(unit, facts) for unit, facts in units if not ledger.is_done(unit)]
    if not left:
        return found, []
    try:
        subject = Subject.open(cfg, found.runs, rois)
        return found, [_light(cfg, subject, found, unit, facts) for unit, facts in left]
    except (InputError, OSError) as error:
        bad = tuple((unit, one_line(error)) for unit, _ in left)
        kept = tuple(one for one in units if one not in left)
        return replace(found, units=kept, failed=(*found.failed, *bad)), []


def _light(
    cfg: SearchlightJobConfig, subject: Subject, found: SubjectInputs, unit: Unit, facts: UnitFacts
) -> Light:
    target = next(target for target in cfg.targets() if target.name == unit.target)
    config, grid = cfg.light_of(target), Grid.of(subject.scans[0])
    mask = sphere_voxels_of(subject.regions, unit.roi)
    needs = {
        "n_volumes": sum(scan.n_volumes for scan in subject.scans),
        "n_samples": facts.n_samples,
        "squares": facts.solver_squares,
    }
    centres = subject.regions[0].voxels[unit.roi]
    plan = plan_searchlight(mask, grid, config, centres=centres, **needs)
    block, voxels = largest_bytes(plan, config, **needs)
    mask_hash = str(xxhash.xxh3_128_hexdigest(plan.mask.tobytes()))
    items = tuple(
        LightItem(
            unit=unit,
            number=number,
            block_key=block_key(unit.key, mask_hash, centres),
            runs=found.runs,
            centres=centres,
            at_once=len(centres),
        )
        for number, centres in enumerate(plan.lumps())
    )
    done = {i.number for i in items if key_of(_path(cfg, i)) == i.block_key}
    return Light(
        unit=unit,
        runs=found.runs,
        plan=plan,
        items=items,
        done=frozenset(done),
        need_bytes=BASE_BYTES + BLOCK_BYTES + block + _reading_bytes(found.scans, voxels),
    )


def _path(cfg: FmriConfig, item: LightItem) -> Path:
    return block_path(cfg.run_dir, item.unit, item.number)


def _reading_bytes(scans: Sequence[ScanFacts], voxels: int) -> int:
    """Besides the joined series: one scan's raw rows, scaled, and cleaned; and flags of the grid."""
    longest = max(scan.n_volumes * (scan.itemsize + 2 * 4) for scan in scans)
    return voxels * longest + 16 * scans[0].grid_voxels


def _cache_bytes(cfg: SearchlightJobConfig, subject: SubjectInputs, lights: Sequence[Light]) -> int:
    """What unpacked scans will add to the cache."""
    if not any(light.left for light in lights):
        return 0
    return sum(
        scan.entry_bytes
        for scan in subject.scans
        if not scan.cached
        and way_of(scan, scan.masked_voxels, may_store=True, may_map=True).name != "in place"
    )


def _output_bytes(cfg: SearchlightJobConfig, light: Light) -> int:
    """Of its blocks and maps, at most: compressed, maps of small regions are much smaller; and of its
    row in the file where the group's maps are made."""
    scores = max(1, len(cfg.mvpa.scores))
    n, permutations = len(light.plan.centres), cfg.mvpa.n_permutations
    blocks = n * 8 * (2 + 2 * scores) + len(light.items) * (4096 + 8 * scores * permutations)
    return blocks + (2 * scores + 1) * 4 * n


def _in_order(lights: Sequence[Light]) -> list[LightItem]:
    """The first block of each subject, so that workers unpack different scans; then map by map."""
    heads: dict[str, LightItem] = {}
    for light in lights:
        heads.setdefault(light.unit.subject, light.left[0])
    first = {item.key for item in heads.values()}
    rest = [item for light in lights for item in light.left if item.key not in first]
    return [*heads.values(), *rest]


def _lines(cfg: SearchlightJobConfig, plan: LightPlan) -> list[str]:
    """The plan for people, before anything is read."""
    told = []
    for light in plan.lights:
        told.append(
            f"{light.unit.unit_id}: {len(light.plan.centres)} spheres of {cfg.radius_mm:g} mm in "
            f"{len(light.plan.mask)} voxels, {len(light.items)} blocks, {len(light.done)} done before"
        )
    told.append(
        f"maps: {len(plan.units) + len(plan.failed)}, {len(plan.done)} done before, "
        f"{len(plan.lights)} to make of {len(plan.batches)} blocks, {len(plan.failed)} that cannot be"
    )
    if plan.decision is not None:
        most = max(light.need_bytes for light in plan.lights if light.left)
        told.append(plan.decision.line(most))
    told.append(disk_line(cfg, plan.output_bytes, plan.cache_bytes))
    return told
