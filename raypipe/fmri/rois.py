"""Region names -> voxels on a scan's grid, one bad region not taking the others with it.

What is asked for is ``units.RoiSpec``; how an image or a sphere becomes voxels is ``masks``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from raypipe.errors import InputError
from raypipe.fmri.config import FmriConfig
from raypipe.fmri.masks import (
    Grid,
    Voxels,
    atlas_labels,
    atlas_voxels,
    label_names,
    mask_voxels,
    sphere_voxels,
)
from raypipe.fmri.units import BRAIN, RoiSpec
from raypipe.read.runfiles import RunFiles


@dataclass(frozen=True, eq=False, kw_only=True)
class Regions:
    """Regions of one subject on one grid.

    voxels  : name -> (n,) flat indices, inside the brain mask where there is one
    outside : name -> how many voxels the brain mask left out
    bad     : name -> why it has none
    brain   : (n,) the brain mask, None where there is none
    """

    voxels: Mapping[str, Voxels]
    outside: Mapping[str, int]
    bad: Mapping[str, str]
    brain: Voxels | None


def wanted_rois(cfg: FmriConfig) -> tuple[RoiSpec, ...]:
    """The ROIs of ``cfg``: those it names, all of the atlas, or the brain when it names none.

    Raises InputError when all regions of an atlas are wanted that differs by subject.
    """
    named = cfg.named_rois()
    if cfg.atlas is not None and not cfg.atlas_labels:
        return (*named, *_whole_atlas(cfg.atlas, str(cfg.atlas_names or "")))
    return named or (RoiSpec(name=BRAIN, kind="brain"),)


def _whole_atlas(atlas: str, names: str) -> list[RoiSpec]:
    if "{" in atlas:
        raise InputError(
            f"atlas {atlas} differs by subject, so its regions are not known beforehand; give "
            "--atlas-labels"
        )
    return [
        RoiSpec(name=label, kind="atlas", source=atlas, label=label, names=names)
        for label in atlas_labels(atlas, label_names(names) if names else None)
    ]


def filled(text: str, run: RunFiles) -> str:
    """``text`` with {subject}, {session}, {task} and {run} replaced by the run's."""
    words = {"subject": run.subject, "session": run.session, "task": run.task, "run": run.run}
    for name, word in words.items():
        if f"{{{name}}}" in text:
            if word is None:
                raise InputError(f"{text} names {{{name}}}, which {run.name} has not; leave it out")
            text = text.replace(f"{{{name}}}", word)
    return text


def roi_files(spec: RoiSpec, run: RunFiles) -> list[Path]:
    """The files that decide which voxels ``spec`` has in ``run``."""
    if spec.kind == "brain":
        return []
    return [Path(filled(text, run)) for text in (spec.source, spec.names) if text]


def find_regions(specs: Sequence[RoiSpec], run: RunFiles, grid: Grid, *, resample: bool) -> Regions:
    """The voxels of ``specs`` in ``run``. Raises InputError for a brain mask that cannot be used."""
    brain = None if run.mask is None else mask_voxels(run.mask, grid, resample=resample)
    voxels: dict[str, Voxels] = {}
    outside: dict[str, int] = {}
    bad: dict[str, str] = {}
    atlases = _of_atlases(specs, run, grid, resample)
    for spec in specs:
        try:
            found = atlases.get(spec.name)
            if found is None:
                found = _one(spec, run, grid, brain, resample)
            left = found if brain is None else found[np.isin(found, brain, assume_unique=True)]
            outside[spec.name] = len(found) - len(left)
            if not left.size:
                raise InputError(
                    f"ROI {spec.name} of {run.name} lies outside the brain mask {run.mask}; "
                    "correct one of them"
                )
            voxels[spec.name] = left
        except InputError as error:
            bad[spec.name] = str(error)
    return Regions(voxels=voxels, outside=outside, bad=bad, brain=brain)


def common(first: Regions, second: Regions) -> Regions:
    """The voxels that both runs have; a region that is bad in one is bad."""
    bad = {**second.bad, **first.bad}
    voxels: dict[str, Voxels] = {}
    outside = dict(first.outside)
    for name in first.voxels:
        if name in bad:
            continue
        voxels[name] = np.intersect1d(
            first.voxels[name], second.voxels[name], assume_unique=True
        ).astype(np.int64)
        outside[name] += len(first.voxels[name]) - len(voxels[name])
        if not voxels[name].size:
            bad[name] = f"ROI {name} has no voxel that all runs have; look at the runs' masks"
            del voxels[name]
    return replace(first, voxels=voxels, outside=outside, bad=bad)


def _of_atlases(
    specs: Sequence[RoiSpec], run: RunFiles, grid: Grid, resample: bool
) -> dict[str, Voxels]:
    """ROIs of atlases, each image read once; those that fail are left to be tried alone."""
    groups: dict[tuple[str, str], list[RoiSpec]] = {}
    for spec in specs:
        if spec.kind == "atlas":
            groups.setdefault((spec.source, spec.names), []).append(spec)
    found: dict[str, Voxels] = {}
    for (source, names), group in groups.items():
        try:
            known = label_names(filled(names, run)) if names else None
            labels = [spec.label for spec in group]
            path = filled(source, run)
            of = atlas_voxels(path, grid, labels, names=known, resample=resample)
        except InputError:
            continue
        found |= {spec.name: of[spec.label] for spec in group}
    return found


def _one(spec: RoiSpec, run: RunFiles, grid: Grid, brain: Voxels | None, resample: bool) -> Voxels:
    if spec.kind == "brain":
        if brain is None:
            raise InputError(
                f"{run.name} has no brain mask; give --roi NAME=mask.nii.gz, or a mask column"
            )
        return brain
    if spec.kind == "sphere":
        return sphere_voxels(spec.centre_mm, spec.radius_mm, grid)
    path = filled(spec.source, run)
    if spec.kind == "mask":
        return mask_voxels(path, grid, resample=resample)
    known = label_names(filled(spec.names, run)) if spec.names else None
    return atlas_voxels(path, grid, [spec.label], names=known, resample=resample)[spec.label]
