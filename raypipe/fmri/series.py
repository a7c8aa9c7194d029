"""All regions of a subject, read together and cleaned run by run.

A scan that has to be unpacked is unpacked once for all of them. What is kept of a region is its caller's
affair: a time series is written as it comes (``work``), patterns are put side by side (``joined``).
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raypipe.fmri.clean import Cleaned, clean
from raypipe.fmri.config import FmriConfig, MvpaJobConfig, RoiConfig
from raypipe.fmri.inputs import regions_of, t_r_of, with_t_r
from raypipe.fmri.rois import Regions
from raypipe.fmri.samples import runs_within
from raypipe.fmri.units import RoiSpec
from raypipe.read.confounds import read_confounds
from raypipe.read.nifti import Scan, open_scan
from raypipe.read.runfiles import RunFiles
from raypipe.store.space import preallocate
from raypipe.store.voxels import obtain

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False, kw_only=True)
class Subject:
    """A subject's runs, opened. scans, regions : a run; t_r_s : of decoding; None where no header tells."""

    runs: tuple[RunFiles, ...]
    scans: tuple[Scan, ...]
    regions: tuple[Regions, ...]
    t_r_s: float | None

    @classmethod
    def open(cls, cfg: FmriConfig, runs: Sequence[RunFiles], rois: Sequence[RoiSpec]) -> Subject:
        """Headers and masks; no scan is read."""
        scans = tuple(open_scan(run.bold) for run in runs)
        regions = tuple(regions_of(cfg, rois, runs, scans))
        # Runs of other TRs are no fault where each stands for itself; decoding has one delay for all.
        t_r_s = t_r_of(cfg, scans) if isinstance(cfg, MvpaJobConfig) else None
        return cls(runs=tuple(runs), scans=scans, regions=regions, t_r_s=t_r_s)


@dataclass(frozen=True, eq=False, kw_only=True)
class RunSeries:
    """One region of one run. index : of the run; n_volumes : of its scan; way : from where it was read."""

    index: int
    roi: str
    n_volumes: int
    cleaned: Cleaned
    way: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Joined:
    """One region of all runs. values : (n_voxels, m) float32; volumes : (m,) counted over all scans.

    not_finite, constant : how many voxels; ways : of each scan
    """

    values: Floats
    volumes: NDArray[np.int64]
    not_finite: int
    constant: int
    ways: tuple[str, ...]


def run_series(
    cfg: FmriConfig,
    subject: Subject,
    rois: Sequence[str],
    *,
    use_memmap: bool = True,
    threads: int = 1,
    out: Mapping[str, Floats] | None = None,
    say: Callable[[str], None] = print,
) -> Iterator[RunSeries]:
    """Yield each run's ``rois`` in turn, read in one pass where they are not cached.

    out : ROI -> (n_voxels, volumes of all scans), where the cleaned series of unscrubbed runs are
    written at once. Raises InputError.
    """
    first = 0
    for index, (run, scan, regions) in enumerate(
        zip(subject.runs, subject.scans, subject.regions, strict=True)
    ):
        confounds = read_confounds(run, cfg.confounds)
        within = runs_within(cfg, run, scan.n_volumes) if isinstance(cfg, MvpaJobConfig) else None
        series = obtain(
            scan,
            {roi: regions.voxels[roi] for roi in rois},
            mask_flat=regions.brain,
            cache_dir=cfg.cache_folder(),
            quota_bytes=cfg.quota_bytes(),
            use_memmap=use_memmap,
            say=say,
        )
        kept = None if confounds is None else confounds.kept
        for roi in rois:
            values = series.scaled(roi)
            del series.raw[roi]
            if isinstance(cfg, RoiConfig) and cfg.reduce == "mean":
                values = _mean(values)
            into = None
            if out is not None and kept is None:
                into = out[roi][:, first : first + scan.n_volumes]
            cleaned = clean(
                values,
                with_t_r(cfg.clean, scan.tr_s),
                confounds=None if confounds is None else confounds.values,
                sample_mask=kept,
                runs=within,
                threads=threads,
                out=into,
            )
            yield RunSeries(
                index=index,
                roi=roi,
                n_volumes=scan.n_volumes,
                cleaned=cleaned,
                way=series.way.name,
            )
        if series.pending is not None and (entry := series.pending.store()) is not None:
            entry.close()
        first += scan.n_volumes


def joined(
    cfg: FmriConfig,
    subject: Subject,
    rois: Sequence[str],
    *,
    scratch: Path | None,
    mapped: frozenset[str] = frozenset(),
    use_memmap: bool = True,
    threads: int = 1,
    say: Callable[[str], None] = print,
) -> dict[str, Joined]:
    """Each of ``rois`` over all runs. mapped : those kept in a file in ``scratch`` that has no name."""
    total = sum(scan.n_volumes for scan in subject.scans)
    n_voxels = {roi: len(subject.regions[0].voxels[roi]) for roi in rois}
    out = {
        roi: _array((n, total), scratch if roi in mapped else None) for roi, n in n_voxels.items()
    }
    starts = np.cumsum([0, *(scan.n_volumes for scan in subject.scans)])
    at = dict.fromkeys(rois, 0)
    volumes: dict[str, list[NDArray[np.int64]]] = {roi: [] for roi in rois}
    flags = {roi: np.zeros((2, n), bool) for roi, n in n_voxels.items()}
    ways: list[str] = []
    for one in run_series(
        cfg, subject, rois, use_memmap=use_memmap, threads=threads, out=out, say=say
    ):
        lo, hi = at[one.roi], at[one.roi] + one.cleaned.values.shape[1]
        if not np.shares_memory(one.cleaned.values, out[one.roi]) or lo != starts[one.index]:
            out[one.roi][:, lo:hi] = one.cleaned.values
        at[one.roi] = hi
        volumes[one.roi].append(one.cleaned.volumes + starts[one.index])
        flags[one.roi][0] |= one.cleaned.not_finite
        flags[one.roi][1] |= one.cleaned.constant
        if len(ways) == one.index:
            ways.append(one.way)
    return {
        roi: Joined(
            values=out[roi][:, : at[roi]],
            volumes=np.concatenate(volumes[roi]),
            not_finite=int(flags[roi][0].sum()),
            constant=int(flags[roi][1].sum()),
            ways=tuple(ways),
        )
        for roi in rois
    }


def _mean(values: Floats) -> Floats:
    """(1, T) the mean of the voxels that are finite throughout; NaN, which is counted, for none."""
    finite = np.isfinite(values).all(axis=1)
    if not finite.any():
        return np.full((1, values.shape[1]), np.nan, np.float32)
    mean: Floats = values[finite].mean(axis=0, dtype=np.float64, keepdims=True).astype(np.float32)
    return mean


def _array(shape: tuple[int, int], scratch: Path | None) -> Floats:
    """In memory, or in a file of folder ``scratch`` that has no name: the kernel frees it with its last
    user."""
    if scratch is None:
        return np.empty(shape, np.float32)
    with tempfile.TemporaryFile(dir=scratch) as file:
        preallocate(file.fileno(), scratch, 4 * shape[0] * shape[1])  # a full disk ends here
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            return np.memmap(file, np.float32, "r+", shape=shape)
