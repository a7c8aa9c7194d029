"""One subject, open: its runs' series, and for each map its samples, spheres and scorer.

Kept by a worker from block to block: reading masks and headers takes longer than a small block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from raypipe.fmri.masks import Grid, Voxels
from raypipe.fmri.mvpa import Design, make_folds
from raypipe.fmri.mvpa.decode import score_names
from raypipe.fmri.mvpa.scores import chance
from raypipe.fmri.samples import design_of
from raypipe.fmri.searchlight.geometry import inside_mask, sphere_offsets, spheres
from raypipe.fmri.searchlight.job import SearchlightJobConfig
from raypipe.fmri.searchlight.plan import Block, SearchlightConfig
from raypipe.fmri.searchlight.runs import LightRuns, sphere_voxels_of
from raypipe.fmri.searchlight.score import BlockScores, SearchlightWorker
from raypipe.fmri.series import Subject
from raypipe.fmri.units import RoiSpec, Unit
from raypipe.read.runfiles import RunFiles


@dataclass(frozen=True, eq=False, kw_only=True)
class OpenMap:
    """What all blocks of one map share. inside : (x*y*z,) voxels that spheres are made of."""

    runs: LightRuns
    design: Design
    config: SearchlightConfig
    grid: Grid
    offsets: NDArray[np.int64]
    inside: NDArray[np.bool_]

    def score(self, centres: Voxels) -> BlockScores:
        """Scores of the spheres around ``centres``."""
        own = spheres(centres, self.offsets, self.inside, self.grid)
        worker = SearchlightWorker(self.runs, self.design, self.config)
        return worker(Block(number=0, centres=centres, spheres=own))

    def n_folds(self) -> int:
        """How often a model is fitted."""
        return len(make_folds(self.design, self.config.decode))

    def chance(self) -> dict[str, float]:
        """Score -> what guessing gives, of the samples that are left."""
        labels = self.design.encoded()
        counts = np.bincount(labels) if self.design.is_classes else np.array([len(labels)])
        names = score_names(self.design, self.config.decode)
        return {name: chance(name, counts) for name in names}


@dataclass(kw_only=True)
class OpenSubject:
    """A subject's runs, opened as they are needed. reads : blocks likely to be asked of each scan."""

    cfg: SearchlightJobConfig
    rois: tuple[RoiSpec, ...]
    files: tuple[RunFiles, ...]
    reads: int
    use_memmap: bool
    subject: Subject = field(init=False)
    _runs: dict[str, LightRuns] = field(init=False, default_factory=dict)
    _maps: dict[Unit, OpenMap] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.subject = Subject.open(self.cfg, self.files, self.rois)

    def map_of(self, unit: Unit, say: Callable[[str], None]) -> OpenMap:
        """What ``unit`` is scored with; unpacks scans that are not in the cache."""
        if unit not in self._maps:
            self._maps[unit] = self._open(unit, say)
        return self._maps[unit]

    def close(self) -> None:
        """Let go of the cache's entries."""
        for runs in self._runs.values():
            runs.close()

    def _open(self, unit: Unit, say: Callable[[str], None]) -> OpenMap:
        cfg, subject = self.cfg, self.subject
        target = next(target for target in cfg.targets() if target.name == unit.target)
        n_volumes = [scan.n_volumes for scan in subject.scans]
        design = design_of(cfg, target, subject.runs, n_volumes, subject.t_r_s)
        voxels = sphere_voxels_of(subject.regions, unit.roi)
        runs = self._series(unit.roi, voxels, say)
        config, grid = cfg.light_of(target), Grid.of(subject.scans[0])
        return OpenMap(
            runs=runs,
            design=design.left(runs.volumes),
            config=config,
            grid=grid,
            offsets=sphere_offsets(grid, config.radius_mm),
            inside=inside_mask(voxels, grid),
        )

    def _series(self, roi: str, voxels: Voxels, say: Callable[[str], None]) -> LightRuns:
        if roi not in self._runs:
            self._runs[roi] = LightRuns(
                self.cfg,
                self.subject,
                voxels,
                reads=self.reads,
                use_memmap=self.use_memmap,
                say=say,
            )
        return self._runs[roi]
