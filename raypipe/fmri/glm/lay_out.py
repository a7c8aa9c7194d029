"""From options to a plan of models: units that are done left out, the others with what they take.

A unit is a run of a subject and region (trials), or all its runs (conditions). Headers, masks and events
are looked at, no scan is read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import xxhash

from raypipe import config as configs
from raypipe.errors import InputError
from raypipe.fmri.config import FmriConfig
from raypipe.fmri.content import digest
from raypipe.fmri.glm.blocks import block_bytes_at_most
from raypipe.fmri.glm.estimate import events_of
from raypipe.fmri.glm.items import BetaItem
from raypipe.fmri.glm.job import BetasConfig
from raypipe.fmri.glm.trials import chosen
from raypipe.fmri.inputs import (
    SubjectInputs,
    check_alike,
    look_at,
    one_line,
    run_stem,
    subjects_of,
)
from raypipe.fmri.ledger import Ledger
from raypipe.fmri.masks import Grid
from raypipe.fmri.plan import BASE_BYTES, ScanFacts, decide, way_of
from raypipe.fmri.planned import Planned, disk_line
from raypipe.fmri.prepare import LOOKING
from raypipe.fmri.results import source_of
from raypipe.fmri.rois import wanted_rois
from raypipe.fmri.units import RoiSpec, Unit, check_distinct, slug
from raypipe.memory.config import ResolvedMemory
from raypipe.read.nifti import open_scan
from raypipe.read.runfiles import RunFiles
from raypipe.runner import Machines
from raypipe.store.voxels import BLOCK_BYTES

RESULT_FORMAT = 2  # a higher one computes finished units anew
# What the units' numbers depend on; block_memory and where things lie are none of it.
_OPTIONS = (
    *("method", "contrast", "keep", "others", "label_column", "rest", "hrf", "drift", "drift_hz"),
    *("drift_order", "slice_time_ref", "noise", "scaling", "clean", "confounds", "resample"),
)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A unit that can be computed. results_bytes : of its images, at most; need_bytes : of a worker."""

    item: BetaItem
    results_bytes: int
    need_bytes: int


@dataclass(frozen=True, eq=False, kw_only=True)
class BetaPlan(Planned):
    """Models. fits : all that can be computed; refused : units that cannot; batches : the rest."""

    fits: tuple[Fit, ...]
    refused: tuple[tuple[Unit, str], ...]
    batches: tuple[BetaItem, ...]

    @property
    def failed(self) -> list[tuple[Unit, str]]:
        """Units that cannot be computed, and why."""
        return list(self.refused)

    @property
    def units(self) -> list[Unit]:
        """Units that are done or can be computed, in the order of subjects, ROIs and runs."""
        return [fit.item.unit for fit in self.fits]


def lay_out(cfg: FmriConfig, memory: ResolvedMemory, machines: Machines) -> BetaPlan:
    """Look at all inputs of ``cfg`` (absolute paths) and decide.

    Raises InputError when no unit at all can be computed, MemoryBudgetExceeded for one that fits no
    worker.
    """
    if not isinstance(cfg, BetasConfig):
        raise TypeError(f"{type(cfg).__name__} is no BetasConfig")
    rois = wanted_rois(cfg)
    with ThreadPoolExecutor(LOOKING) as threads:
        subjects = list(threads.map(lambda name: look_at(cfg, name, rois, ()), subjects_of(cfg)))
    check_alike(cfg, subjects)
    fits: list[Fit] = []
    failed: list[tuple[Unit, str]] = []
    for subject in subjects:
        failed += subject.failed
        for unit, _ in subject.units:
            for one in _fits(cfg, subject, next(s for s in rois if s.name == unit.roi)):
                if isinstance(one, Fit):
                    fits.append(one)
                else:
                    failed.append(one)
    check_distinct([*(fit.item.unit for fit in fits), *(unit for unit, _ in failed)])
    if not fits:
        raise InputError(f"none of {len(failed)} units can be computed: {failed[0][1]}")
    ledger = Ledger(cfg.run_dir)
    left = [fit for fit in fits if not ledger.is_done(fit.item.unit)]
    decision = None
    if left:
        decision = decide(
            memory,
            machines=machines,
            asked=cfg.workers,
            n_units=len(left),
            largest_bytes=max(fit.need_bytes for fit in left),
        )
    waiting = {fit.item.unit.subject for fit in left}
    plan = BetaPlan(
        subjects=tuple(subjects),
        rois=rois,
        fits=tuple(fits),
        refused=tuple(failed),
        done=tuple(fit.item.unit for fit in fits if fit not in left),
        batches=tuple(fit.item for fit in left),
        decision=decision,
        cache_bytes=sum(_cache_bytes(one) for one in subjects if one.subject in waiting),
        output_bytes=sum(fit.results_bytes for fit in left),
    )
    return replace(plan, lines=tuple(_lines(cfg, plan, left)))


def _fits(cfg: BetasConfig, subject: SubjectInputs, spec: RoiSpec) -> list[Fit | tuple[Unit, str]]:
    """The units of one subject and region; those that cannot be computed, with the reason."""
    if cfg.method == "conditions":
        return [_fit(cfg, subject, spec, subject.runs, 0, "conditions")]
    return [
        _fit(cfg, subject, spec, (run,), index, _words(run, index))
        for index, run in enumerate(subject.runs)
    ]


def _words(run: RunFiles, index: int) -> str:
    """``run-1``, with session and task where there are such."""
    return run_stem(run, index).removeprefix(f"sub-{slug(run.subject)}_").replace("_", "-")


def _fit(
    cfg: BetasConfig,
    subject: SubjectInputs,
    spec: RoiSpec,
    runs: tuple[RunFiles, ...],
    first: int,
    words: str,
) -> Fit | tuple[Unit, str]:
    unit = Unit(subject=subject.subject, roi=spec.name, target=words)
    try:
        _check_grid(runs)
        events = [events_of(cfg, run) for run in runs]
        n_maps = 3 * (len(cfg.contrasts()) or len({k for e in events for k in e.trial_type}))
        if cfg.method != "conditions":
            n_maps = len(chosen(events[0], cfg.keep))
        unit = replace(unit, key=_key(cfg, spec, runs))
    except (InputError, OSError) as error:
        return unit, one_line(error)
    scans = subject.scans[first : first + len(runs)]
    voxels = subject.roi_voxels[spec.name]
    held = voxels * n_maps * (4 if cfg.method != "conditions" else 16)
    images = 4 * 4 * scans[0].grid_voxels  # one volume, packed
    columns = 3 if "dispersion" in cfg.hrf else 2 if "derivative" in cfg.hrf else 1
    longest = max(scan.n_volumes for scan in scans)
    block = block_bytes_at_most(longest, (10 * columns + 4) * n_maps, cfg.budget_bytes())
    item = BetaItem(unit=unit, runs=runs, first=first, budget_bytes=cfg.budget_bytes())
    return Fit(
        item=item,
        results_bytes=4 * voxels * n_maps,
        need_bytes=BASE_BYTES + BLOCK_BYTES + block + held + images,
    )


def _check_grid(runs: Sequence[RunFiles]) -> None:
    grids = [Grid.of(open_scan(run.bold)) for run in runs]
    for run, grid in zip(runs, grids, strict=True):
        if not grid.same_as(grids[0]):
            raise InputError(
                f"{run.name} lies on another grid than {runs[0].name} of that subject; give runs of "
                "one space"
            )


def _key(cfg: BetasConfig, spec: RoiSpec, runs: Sequence[RunFiles]) -> str:
    """32 hex digits, of all that the unit's numbers depend on; no names, no times."""
    files = []
    for run in runs:
        told = source_of(cfg, open_scan(run.bold), run, spec)
        content = {name: told[name] for name in ("size_bytes", "header", "sample")}
        beside = [one["xxh3_128"] for one in told["beside"]]
        events = digest(run.events) if run.events is not None else None
        files.append({**content, "beside": beside, "events": events})
        files[-1]["words"] = [run.session, run.task, run.run]  # they stand in results
    fields = {
        "format": RESULT_FORMAT,
        "roi": configs.to_dict(spec) | {"source": None, "names": None},
        "files": files,
        "options": {name: configs.to_dict(cfg)[name] for name in _OPTIONS},
    }
    text = json.dumps(fields, sort_keys=True, default=str)
    return str(xxhash.xxh3_128_hexdigest(text.encode()))


def _cache_bytes(subject: SubjectInputs) -> int:
    """What unpacked scans will add to the cache."""
    return sum(scan.entry_bytes for scan in subject.scans if _is_built(scan))


def _is_built(scan: ScanFacts) -> bool:
    way = way_of(scan, scan.masked_voxels, may_store=True, may_map=True)
    return not scan.cached and way.name != "in place"


def _lines(cfg: BetasConfig, plan: BetaPlan, left: Sequence[Fit]) -> list[str]:
    """The plan for people, before anything is read."""
    what = "all runs of a subject" if cfg.method == "conditions" else "a run"
    told = [
        f"units: {len(plan.fits) + len(plan.failed)}, each {what} and region by {cfg.method}; "
        f"{len(plan.done)} done before, {len(left)} to compute, {len(plan.failed)} that cannot be"
    ]
    if plan.decision is not None:
        told.append(plan.decision.line(max(fit.need_bytes for fit in left)))
    told.append(disk_line(cfg, plan.output_bytes, plan.cache_bytes))
    return told
