"""What each subject has, from headers and small files alone: scans, regions, samples, and unit keys.

No scan is unpacked here; a plain .nii is read once, for its hash. What cannot be used ends the units that
need it, each with its reason, and no others: a subject's missing file its own, a bad region that region's.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from raypipe import config as configs
from raypipe.errors import InputError, MissingInput
from raypipe.fmri.clean import CleanConfig
from raypipe.fmri.config import FmriConfig, MvpaJobConfig, RoiConfig
from raypipe.fmri.content import content_of, digest
from raypipe.fmri.masks import Grid
from raypipe.fmri.mvpa import Design, make_folds
from raypipe.fmri.mvpa.estimators import maps_at_most, solver_rows, solver_squares
from raypipe.fmri.plan import ScanFacts, UnitFacts
from raypipe.fmri.rois import Regions, common, find_regions, roi_files
from raypipe.fmri.samples import design_of, has_onsets, label_files
from raypipe.fmri.units import RoiSpec, Target, Unit, slug
from raypipe.read.bids import NATIVE, find_runs, tree_subjects
from raypipe.read.confounds import confounds_files
from raypipe.read.nifti import Scan, open_scan
from raypipe.read.runfiles import RunFiles, bare, check_subjects
from raypipe.read.runtable import choose_runs, table_subjects
from raypipe.store.voxels import find

RESULT_FORMAT = 2  # a higher one computes finished units anew


@dataclass(frozen=True, kw_only=True)
class SubjectInputs:
    """One subject, ready to be planned.

    scans, runs : one each; units : what can be computed; failed : what cannot, and why
    roi_voxels  : ROI -> how many
    """

    subject: str
    runs: tuple[RunFiles, ...]
    scans: tuple[ScanFacts, ...]
    roi_voxels: Mapping[str, int]
    units: tuple[tuple[Unit, UnitFacts], ...]
    failed: tuple[tuple[Unit, str], ...]


def subjects_of(cfg: FmriConfig) -> tuple[str, ...]:
    """The subjects asked for, or all that are there.

    Raises MissingInput for no table or folder, and for a subject that is not in it: a name that was
    mistyped is told at once, not when all others are done.
    """
    if cfg.raw_dir is not None and not cfg.raw_dir.is_dir():
        raise MissingInput(
            f"raw_dir {cfg.raw_dir} does not exist; give the BIDS data set that holds events.tsv"
        )
    where = cfg.table or _given(cfg.bids_dir)
    found = table_subjects(where) if cfg.table is not None else tree_subjects(where)
    if not found:
        raise MissingInput(f"{cfg.bids_dir} holds no sub-… folder; give the fMRIPrep output")
    check_subjects(cfg.query.subjects, found, where)
    return tuple(dict.fromkeys(bare(name, "sub") for name in cfg.query.subjects)) or found


def runs_of(cfg: FmriConfig, subject: str) -> tuple[RunFiles, ...]:
    """The runs of ``subject`` that ``cfg`` asks for; raises InputError where there is none."""
    if cfg.table is not None:
        return choose_runs(cfg.table, subject, cfg.query)
    query = replace(cfg.query, subjects=(subject,))
    return find_runs(_given(cfg.bids_dir), query, raw_root=cfg.raw_dir)


def look_at(
    cfg: FmriConfig, subject: str, rois: Sequence[RoiSpec], targets: Sequence[Target]
) -> SubjectInputs:
    """All that is to be known of ``subject`` before a scan is read; never raises InputError."""
    every = [(spec, target) for spec in rois for target in (targets or (None,))]
    try:
        runs = runs_of(cfg, subject)
        _check_names(runs)
        scans = tuple(open_scan(run.bold) for run in runs)
        if cfg.clean.filter is not None:
            for scan in scans:
                with_t_r(cfg.clean, scan.tr_s).sampling_hz()  # refuses what it cannot resolve
        regions = regions_of(cfg, rois, runs, scans)
        facts = [_scan_facts(cfg, scan, found) for scan, found in zip(scans, regions, strict=True)]
        sources = [_source(scan, run) for scan, run in zip(scans, runs, strict=True)]
    except (InputError, OSError) as error:
        reason = one_line(error)
        failed = tuple((_unit(subject, spec, target), reason) for spec, target in every)
        return SubjectInputs(
            subject=subject, runs=(), scans=(), roi_voxels={}, units=(), failed=failed
        )
    designs = _designs(cfg, targets, runs, scans)
    sizes, wrong_rois = _sizes(regions)
    units: list[tuple[Unit, UnitFacts]] = []
    bad: list[tuple[Unit, str]] = []
    for spec, target in every:
        unit = _unit(subject, spec, target)
        design = designs[target.name] if target else None
        try:
            if spec.name in wrong_rois:
                raise InputError(wrong_rois[spec.name])
            if isinstance(design, InputError):
                raise design
            key = _key(cfg, spec, target, runs, sources)
            units.append((replace(unit, key=key), _unit_facts(cfg, target, design)))
        except (InputError, OSError) as error:
            bad.append((unit, one_line(error)))
    return SubjectInputs(
        subject=subject,
        runs=runs,
        scans=tuple(facts),
        roi_voxels=sizes,
        units=tuple(units),
        failed=tuple(bad),
    )


def check_alike(cfg: FmriConfig, subjects: Sequence[SubjectInputs]) -> None:
    """Raises InputError when subjects differ in space, or in a BIDS tree in task: they enter one group.

    ``find_runs`` is asked for a subject at a time, and so cannot see it.
    """
    runs = [run for subject in subjects for run in subject.runs]
    has = {"space": {run.space or NATIVE for run in runs}}
    if cfg.table is None:  # a table says itself which tasks go together
        has["task"] = {run.task or "none" for run in runs}
    for key, values in has.items():
        if len(values) > 1:
            raise InputError(
                f"subjects differ in {key}: {', '.join(sorted(values))}; choose one by --{key}"
            )


def regions_of(
    cfg: FmriConfig,
    rois: Sequence[RoiSpec],
    runs: Sequence[RunFiles],
    scans: Sequence[Scan],
) -> list[Regions]:
    """The regions in each run. For decoding, which puts runs side by side, all are on one grid."""
    found: list[Regions] = []
    for run, scan in zip(runs, scans, strict=True):
        grid = Grid.of(scan)
        if isinstance(cfg, MvpaJobConfig) and not grid.same_as(Grid.of(scans[0])):
            raise InputError(
                f"{run.name} lies on another grid than {runs[0].name} of that subject; give runs of "
                "one space"
            )
        found.append(find_regions(rois, run, grid, resample=cfg.resample))
    if isinstance(cfg, MvpaJobConfig):
        shared = functools.reduce(common, found)
        return [replace(shared, brain=one.brain) for one in found]
    return found


def t_r_of(cfg: FmriConfig, scans: Sequence[Scan]) -> float | None:
    """Seconds a volume: as given, else as the headers say. Raises InputError when those differ."""
    if cfg.clean.t_r_s is not None:
        return cfg.clean.t_r_s
    told = {round(scan.tr_s, 6) for scan in scans if scan.tr_s is not None}
    if len(told) > 1:
        raise InputError(
            f"the runs' headers tell different TRs, {', '.join(f'{tr:g}' for tr in sorted(told))} s; "
            "give --t-r-s"
        )
    return told.pop() if told else None


def with_t_r(config: CleanConfig, tr_s: float | None) -> CleanConfig:
    """A filter works in seconds: by the header's TR where none is given."""
    return replace(config, t_r_s=tr_s) if config.t_r_s is None and tr_s is not None else config


def small_files(cfg: FmriConfig, spec: RoiSpec, run: RunFiles) -> list[Path]:
    """The files beside the scan and its brain mask that the numbers of ``spec`` in ``run`` come from."""
    found = roi_files(spec, run)
    found += confounds_files(run, cfg.confounds)
    if isinstance(cfg, MvpaJobConfig):
        found.append(label_files(cfg, run))
    return found


def _given(path: Path | None) -> Path:
    if path is None:
        raise InputError("no bids_dir is given; give one, or a table")
    return path


def run_stem(run: RunFiles, index: int) -> str:
    """``sub-01_ses-1_task-x_run-1``; a run without a number is called by its place."""
    number = run.run or f"{index + 1}"
    words = (("sub", run.subject), ("ses", run.session), ("task", run.task), ("run", number))
    return "_".join(f"{key}-{slug(word)}" for key, word in words if word)


def _check_names(runs: Sequence[RunFiles]) -> None:
    spaces: dict[str, set[str]] = {}
    stems = [run_stem(run, index) for index, run in enumerate(runs)]
    for stem, run in zip(stems, runs, strict=True):
        spaces.setdefault(stem, set()).add(run.space or NATIVE)
        if len(spaces[stem]) > 1:
            raise InputError(
                f"{stem} is there in spaces {', '.join(sorted(spaces[stem]))}; choose one by --space"
            )
    for stem in stems:
        if stems.count(stem) > 1:
            raise InputError(f"two runs are both {stem}; tell them apart by session, task or run")


def _unit(subject: str, spec: RoiSpec, target: Target | None) -> Unit:
    return Unit(subject=subject, roi=spec.name, target=target.name if target else "")


def _scan_facts(cfg: FmriConfig, scan: Scan, regions: Regions) -> ScanFacts:
    cache = cfg.cache_folder()
    entry = find(scan, regions.brain, cache, say=lambda text: None) if cache is not None else None
    if entry is not None:
        entry.close()
    return ScanFacts(
        name=scan.path.name,
        compressed=scan.compressed,
        n_volumes=scan.n_volumes,
        itemsize=int(scan.dtype.itemsize),
        grid_voxels=scan.volume_voxels,
        masked_voxels=scan.volume_voxels if regions.brain is None else len(regions.brain),
        cached=entry is not None,
    )


def _sizes(regions: Sequence[Regions]) -> tuple[dict[str, int], dict[str, str]]:
    """(ROI -> voxels, of the run where it has most; ROI -> why it cannot be used in some run)."""
    bad: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for found in regions:
        bad |= {name: why for name, why in found.bad.items() if name not in bad}
        for name, voxels in found.voxels.items():
            sizes[name] = max(sizes.get(name, 0), len(voxels))
    return {name: n for name, n in sizes.items() if name not in bad}, bad


def _designs(
    cfg: FmriConfig,
    targets: Sequence[Target],
    runs: Sequence[RunFiles],
    scans: Sequence[Scan],
) -> dict[str, Design | InputError]:
    """Target -> its design, or why there is none."""
    if not isinstance(cfg, MvpaJobConfig):
        return {}
    found: dict[str, Design | InputError] = {}
    for target in targets:
        try:
            n_volumes = [scan.n_volumes for scan in scans]
            design = design_of(cfg, target, runs, n_volumes, t_r_of(cfg, scans))
            make_folds(design, cfg.decoding_of(target))
            found[target.name] = design
        except InputError as error:
            found[target.name] = error
    return found


def _unit_facts(cfg: FmriConfig, target: Target | None, design: Design | None) -> UnitFacts:
    if target is None or design is None or not isinstance(cfg, MvpaJobConfig):
        return UnitFacts()
    decoding = cfg.decoding_of(target)
    n_classes = len(design.classes)
    gram = decoding.model.estimator in ("svc", "svr", "ridge", "ridge_classifier")
    return UnitFacts(
        n_samples=len(design),
        n_folds=len(make_folds(design, decoding)),
        keeps_folds=not gram,
        n_maps=maps_at_most(decoding.model, n_classes) if cfg.weight_maps else 0,
        solver_rows=solver_rows(decoding.model, n_classes, len(design)),
        solver_squares=solver_squares(decoding.model, n_classes),
    )


def _source(scan: Scan, run: RunFiles) -> dict[str, Any]:
    """What identifies a scan by its content, not by its name or time."""
    return {
        "size_bytes": scan.size_bytes,
        "header": scan.header_hash,
        "sample": content_of(scan),
        "mask": None if run.mask is None else digest(run.mask),
    }


def _key(
    cfg: FmriConfig,
    spec: RoiSpec,
    target: Target | None,
    runs: Sequence[RunFiles],
    sources: Sequence[Mapping[str, Any]],
) -> str:
    """32 hex digits, of all that the unit's numbers depend on."""
    asked = configs.to_dict(spec) | {"source": None, "names": None}
    options = {"clean": cfg.clean, "confounds": cfg.confounds, "resample": cfg.resample}
    files = []
    for run, source in zip(runs, sources, strict=True):
        small = small_files(cfg, spec, run)
        words = [run.session, run.task, run.run]  # they stand in results
        files.append({**source, "small": [digest(path) for path in small], "words": words})
    fields: dict[str, Any] = {"format": RESULT_FORMAT, "roi": asked, "files": files}
    fields |= {name: configs.to_dict(value) for name, value in options.items()}
    if isinstance(cfg, RoiConfig):
        fields |= {"reduce": cfg.reduce}
    if isinstance(cfg, MvpaJobConfig) and target is not None:
        fields |= {
            "target": configs.to_dict(target),
            "decoding": configs.to_dict(cfg.decoding_of(target)),
            "labels": [cfg.labels is not None, cfg.label_column, sorted(cfg.rest)],
            "samples": [cfg.delay_s, cfg.each],
        }
        fields |= {"weight_maps": True} if cfg.weight_maps else {}  # keys of before stay
        # Rows with an onset were permuted in stretches of one label once.
        fields |= {"rows": "trials"} if any(has_onsets(cfg, run) for run in runs) else {}
    text = json.dumps(fields, sort_keys=True, default=str)
    return str(xxhash.xxh3_128_hexdigest(text.encode()))


def one_line(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or error}; check it"
    return " ".join(str(error).split())
