"""A subject's runs as one source of cleaned series: blocks of voxels, read from the cache.

``LightRuns`` opens every scan once, which unpacks into the cache what is not there, and then reads and
cleans only the voxels that it is asked for. What it found not finite or constant it remembers by voxel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raypipe.fmri.clean import CleanConfig, clean
from raypipe.fmri.config import MvpaJobConfig
from raypipe.fmri.entries import open_entry
from raypipe.fmri.inputs import with_t_r
from raypipe.fmri.masks import Voxels
from raypipe.fmri.rois import Regions
from raypipe.fmri.samples import runs_within
from raypipe.fmri.series import Subject
from raypipe.read.confounds import read_confounds
from raypipe.read.nifti import Scan
from raypipe.store.voxels import VoxelStore, read_in_place
from raypipe.store.voxels.reader import scale

Series = NDArray[np.float32]


def sphere_voxels_of(regions: Sequence[Regions], roi: str) -> Voxels:
    """The voxels that spheres are made of: the brain mask that all runs share, else the region's."""
    brains = [found.brain for found in regions if found.brain is not None]
    if len(brains) < len(regions):
        return regions[0].voxels[roi]
    return functools.reduce(np.intersect1d, brains).astype(np.int64)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Run:
    """One run, open. store : its entry in the cache; None: read in place. columns : of the joined series."""

    scan: Scan
    store: VoxelStore | None
    config: CleanConfig
    confounds: NDArray[np.float64] | None
    kept: NDArray[np.int64] | None
    within: NDArray[np.int64]

    def raw(self, voxels: Voxels, use_memmap: bool) -> NDArray[np.generic]:
        """(n, n_volumes) as stored."""
        if self.store is None:
            return read_in_place(self.scan, voxels)
        return self.store.read(voxels, use_memmap=use_memmap)


class LightRuns:
    """Cleaned series of all runs end to end; a ``sources.SeriesSource``.

    voxels : (n,) flat indices that can be read
    volumes : (m,) of each column, counted over all scans; scrubbed ones are not there
    not_finite, constant : (x * y * z,) of what was read so far; ways : how each scan is read
    """

    def __init__(
        self,
        cfg: MvpaJobConfig,
        subject: Subject,
        voxels: Voxels,
        *,
        reads: int,
        use_memmap: bool = True,
        say: Callable[[str], None] = print,
    ) -> None:
        """reads : how many blocks are likely to be asked for."""
        self.voxels, self._use_memmap = voxels, use_memmap
        self._runs: list[_Run] = []
        self.ways: tuple[str, ...] = ()
        n = int(np.prod(subject.scans[0].shape[:3]))
        self.not_finite, self.constant = np.zeros(n, bool), np.zeros(n, bool)
        for index in range(len(subject.runs)):
            self._runs.append(self._open(cfg, subject, index, reads, say))
        self.volumes = self._columns()

    @property
    def n_volumes(self) -> int:
        """Columns of the joined series."""
        return len(self.volumes)

    def read(self, voxels: Voxels) -> Series:
        """(n, m) float32, cleaned run by run."""
        out = np.empty((len(voxels), self.n_volumes), np.float32)
        lo = 0
        for run in self._runs:
            values = scale(run.raw(voxels, self._use_memmap), run.scan.slope, run.scan.inter)
            cleaned = clean(
                values,
                run.config,
                confounds=run.confounds,
                sample_mask=run.kept,
                runs=run.within,
            )
            hi = lo + cleaned.values.shape[1]
            out[:, lo:hi] = cleaned.values
            self.not_finite[voxels] |= cleaned.not_finite
            self.constant[voxels] |= cleaned.constant
            lo = hi
        return out

    def close(self) -> None:
        """Let go of the cache's entries."""
        for run in self._runs:
            if run.store is not None:
                run.store.close()

    def _open(
        self,
        cfg: MvpaJobConfig,
        subject: Subject,
        index: int,
        reads: int,
        say: Callable[[str], None],
    ) -> _Run:
        run, scan, regions = subject.runs[index], subject.scans[index], subject.regions[index]
        confounds = read_confounds(run, cfg.confounds)
        store, way = open_entry(
            cfg,
            scan,
            regions.brain,
            self.voxels,
            reads=reads,
            use_memmap=self._use_memmap,
            say=say,
        )
        self.ways = (*self.ways, way)
        return _Run(
            scan=scan,
            store=store,
            config=with_t_r(cfg.clean, scan.tr_s),
            confounds=None if confounds is None else confounds.values,
            kept=None if confounds is None else confounds.kept,
            within=runs_within(cfg, run, scan.n_volumes),
        )

    def _columns(self) -> NDArray[np.int64]:
        """Which volumes are left, as cleaning tells of one voxel."""
        found, first = [], 0
        for run in self._runs:
            some = np.zeros((1, run.scan.n_volumes), np.float32)
            told = clean(
                some, run.config, confounds=run.confounds, sample_mask=run.kept, runs=run.within
            )
            found.append(told.volumes + first)
            first += run.scan.n_volumes
        return np.concatenate(found).astype(np.int64)
