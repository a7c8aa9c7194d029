"""From options to a plan: every subject looked at, units that are done left out, the rest in batches.

Nothing is computed and no scan is read; what this takes in memory and disk is known before. The rules
are ``plan``, what there is ``inputs``; ``commands`` carries the plan out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from raypipe.errors import InputError
from raypipe.fmri.config import FmriConfig, MvpaJobConfig
from raypipe.fmri.inputs import SubjectInputs, check_alike, look_at, subjects_of
from raypipe.fmri.ledger import Ledger
from raypipe.fmri.plan import (
    Batch,
    Decision,
    Need,
    decide,
    in_order,
    is_mapped,
    need_of,
    pack,
    parts_of,
    peak_bytes,
    series_bytes,
    split,
    way_of,
)
from raypipe.fmri.planned import Planned, disk_line
from raypipe.fmri.rois import wanted_rois
from raypipe.fmri.units import Unit, check_distinct
from raypipe.memory.config import MemoryConfig, ResolvedMemory
from raypipe.runner import Machines

LOOKING = 8  # threads over subjects: headers and masks, from disks that may be far


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan(Planned):
    """Units of regions. batches : what is left, in order."""

    batches: tuple[Batch, ...]


def make_plan(cfg: FmriConfig, memory: ResolvedMemory, machines: Machines) -> Plan:
    """Look at all inputs of ``cfg`` (absolute paths) and decide.

    Raises InputError when no unit at all can be computed, MemoryBudgetExceeded for one that fits no
    worker.
    """
    rois = wanted_rois(cfg)
    targets = cfg.targets() if isinstance(cfg, MvpaJobConfig) else ()
    with ThreadPoolExecutor(LOOKING) as threads:
        found = threads.map(lambda name: look_at(cfg, name, rois, targets), subjects_of(cfg))
        subjects = tuple(found)
    check_alike(cfg, subjects)
    units = [unit for subject in subjects for unit, _ in subject.units]
    failed = [one for subject in subjects for one in subject.failed]
    check_distinct([*units, *(unit for unit, _ in failed)])
    if not units:
        raise InputError(f"none of {len(failed)} units can be computed: {failed[0][1]}")
    ledger = Ledger(cfg.run_dir)
    done = {unit for unit in units if ledger.is_done(unit)}
    needs = {subject.subject: _needs(subject, done, memory.config) for subject in subjects}
    largest = max((peak_bytes([n]) for of in needs.values() for n in of.values()), default=0)
    left = len(units) - len(done)
    decision = None
    batches: list[Batch] = []
    if left:
        decision = decide(
            memory, machines=machines, asked=cfg.workers, n_units=left, largest_bytes=largest
        )
        batches = _batches(cfg, subjects, done, needs, decision)
    plan = Plan(
        subjects=subjects,
        rois=rois,
        done=tuple(unit for unit in units if unit in done),
        batches=tuple(batches),
        decision=decision,
        cache_bytes=sum(_cache_bytes(cfg, subject, done) for subject in subjects),
        output_bytes=sum(_output_bytes(cfg, subject, done) for subject in subjects),
    )
    return replace(plan, lines=tuple(_lines(cfg, plan, done)))


def _needs(subject: SubjectInputs, done: set[Unit], config: MemoryConfig) -> dict[str, Need]:
    """ROI -> what it takes, of the units that are left."""
    found: dict[str, Need] = {}
    for roi, voxels in subject.roi_voxels.items():
        facts = [known for unit, known in subject.units if unit.roi == roi and unit not in done]
        if facts:
            decoded = [known for known in facts if known.n_samples]
            mapped = is_mapped(config, series_bytes(voxels, subject.scans))
            found[roi] = need_of(voxels, subject.scans, decoded, mapped=mapped)
    return found


def _batches(
    cfg: FmriConfig,
    subjects: Sequence[SubjectInputs],
    done: set[Unit],
    needs: dict[str, dict[str, Need]],
    decision: Decision,
) -> list[Batch]:
    waiting = [subject for subject in subjects if needs[subject.subject]]
    streamed = {
        subject.subject for subject in waiting if _is_streamed(cfg, subject, decision.config)
    }
    lists = [
        _of_subject(
            subject,
            done,
            needs[subject.subject],
            decision,
            partial(
                parts_of,
                streamed=subject.subject in streamed,
                may_store=cfg.cache,
                workers=decision.workers,
                subjects=len(waiting),
            ),
        )
        for subject in waiting
    ]
    return in_order(lists, streamed)


def _of_subject(
    subject: SubjectInputs,
    done: set[Unit],
    needs: dict[str, Need],
    decision: Decision,
    parts: Callable[[int], int],
) -> list[Batch]:
    """The subject's units that are left, in items that fit a worker; parts : of a number of units."""
    mapped = frozenset(
        roi
        for roi in needs
        if is_mapped(decision.config, series_bytes(subject.roi_voxels[roi], subject.scans))
    )
    batches: list[Batch] = []
    for group in pack(needs, decision.limit_bytes):
        units = [u for u, _ in subject.units if u.roi in group and u not in done]
        for chunk in split(units, parts(len(units))):
            rois = list(dict.fromkeys(unit.roi for unit in chunk))
            batches.append(
                Batch(
                    subject=subject.subject,
                    number=len(batches),
                    runs=subject.runs,
                    units=chunk,
                    mapped=mapped,
                    at_once=len(rois),
                    need_bytes=peak_bytes([needs[roi] for roi in rois]),
                )
            )
    return batches


def _is_streamed(cfg: FmriConfig, subject: SubjectInputs, config: MemoryConfig) -> bool:
    """Whether some scan of it has to be read as a whole."""
    ways = _ways(cfg, subject, config)
    return "build" in ways or "one pass" in ways


def _ways(cfg: FmriConfig, subject: SubjectInputs, config: MemoryConfig) -> list[str]:
    """How each scan will be read."""
    voxels = sum(subject.roi_voxels.values())
    return [
        way_of(scan, voxels, may_store=cfg.cache, may_map=config.use_memmap).name
        for scan in subject.scans
    ]


def _cache_bytes(cfg: FmriConfig, subject: SubjectInputs, done: set[Unit]) -> int:
    """What unpacked scans will add to the cache."""
    if not cfg.cache or all(unit in done for unit, _ in subject.units):
        return 0
    voxels = sum(subject.roi_voxels.values())
    return sum(
        scan.entry_bytes
        for scan in subject.scans
        if way_of(scan, voxels, may_store=True, may_map=True).name == "build"
    )


def _output_bytes(cfg: FmriConfig, subject: SubjectInputs, done: set[Unit]) -> int:
    """Of time series, as long as nothing is scrubbed; records are small."""
    if isinstance(cfg, MvpaJobConfig):
        return 0
    left = [unit.roi for unit, _ in subject.units if unit not in done]
    one = getattr(cfg, "reduce", "voxels") == "mean"
    return sum(series_bytes(1 if one else subject.roi_voxels[roi], subject.scans) for roi in left)


def _lines(cfg: FmriConfig, plan: Plan, done: set[Unit]) -> list[str]:
    """The plan for people, before anything is read."""
    told = [_subject_line(cfg, subject, done, plan.decision) for subject in plan.subjects]
    told.append(
        f"units: {len(plan.units) + len(plan.failed)}, {len(plan.done)} done before, {plan.left} to "
        f"compute in {len(plan.batches)} items, {len(plan.failed)} that cannot be"
    )
    if plan.decision is not None:
        told.append(plan.decision.line(max(batch.need_bytes for batch in plan.batches)))
    told.append(disk_line(cfg, plan.output_bytes, plan.cache_bytes))
    return told


def _subject_line(
    cfg: FmriConfig, subject: SubjectInputs, done: set[Unit], decision: Decision | None
) -> str:
    name = f"sub-{subject.subject}"
    if not subject.scans:
        return f"{name}: cannot be used"
    left = [unit for unit, _ in subject.units if unit not in done]
    volumes = sum(scan.n_volumes for scan in subject.scans)
    text = (
        f"{name}: {len(subject.scans)} scan(s), {volumes} volumes, {len(subject.roi_voxels)} ROIs of "
        f"{sum(subject.roi_voxels.values())} voxels"
    )
    if not left or decision is None:
        return f"{text}: nothing to do"
    ways = _ways(cfg, subject, decision.config)
    counted = ", ".join(f"{ways.count(way)} {_WAYS[way]}" for way in dict.fromkeys(ways))
    return f"{text}: {len(left)} units, {counted}"


_WAYS = {
    "cached": "read from the cache",
    "build": "unpacked once into the cache",
    "in place": "read in place",
    "one pass": "read in one pass, nothing stored",
}
