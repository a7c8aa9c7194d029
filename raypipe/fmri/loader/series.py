"""An ROI's cleaned time series over one or several runs, in memory or through maps.

Runs are read and cleaned one after another, each on its own as nilearn's masker does, into their
columns of the result: memory does not grow with the number of runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import InputError
from raypipe.fmri.clean import CleanConfig, Cleaned, clean
from raypipe.fmri.clean.series import in_words
from raypipe.fmri.loader.decide import Placement
from raypipe.fmri.loader.mapped import MemoryMappedArray
from raypipe.fmri.masks import Voxels
from raypipe.read.confounds import ConfoundsConfig, read_confounds
from raypipe.read.nifti import Scan
from raypipe.read.runfiles import RunFiles
from raypipe.store.voxels import build, obtain

_BLOCK_BYTES = 8 << 20  # of float32 series, moved from the cache to a map at a time

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False, kw_only=True)
class RoiSeries:
    """An ROI's cleaned series.

    values : (m, n_voxels) float32, as nilearn's maskers give it; rows are of ``run`` (m,) number 0, 1,
        … and ``volume`` (m,) of that run
    voxels : (n_voxels,) flat C-order indices; not_finite, constant : (n_voxels,) in some run
    """

    values: NDArray[np.float32]
    run: NDArray[np.int64]
    volume: NDArray[np.int64]
    voxels: Voxels
    not_finite: NDArray[np.bool_]
    constant: NDArray[np.bool_]

    def summary(self) -> str:
        """One line for people."""
        m, n = self.values.shape
        return in_words(n, m, self.not_finite, self.constant)


@dataclass(frozen=True, eq=False, kw_only=True)
class RunPart:
    """One run: its scan, the mask its cache entry has, and what is removed from its series.

    confounds : (T, k) or None; kept : volumes that are used, or None for all
    """

    scan: Scan
    cache_mask: Voxels | None
    config: CleanConfig
    confounds: NDArray[np.float64] | None
    kept: NDArray[np.int64] | None

    def volumes(self) -> NDArray[np.int64]:
        """(m,) the volumes that cleaning will leave; no voxel is read."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once, when voxels are cleaned
            return self.clean(np.zeros((1, self.scan.n_volumes), np.float32)).volumes

    def clean(self, series: NDArray[np.float32], out: NDArray[np.float32] | None = None) -> Cleaned:
        """series : (n_voxels, T)."""
        return clean(series, self.config, confounds=self.confounds, sample_mask=self.kept, out=out)


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Where unpacked scans are kept (None: nowhere), and how much all of them may take.

    spill : a temporary folder, for what must be unpacked where nothing is kept
    use_memmap : False: nothing is read through a map
    """

    folder: Path | None
    spill: Path
    quota_bytes: int | None = None
    use_memmap: bool = True


def run_part(
    run: RunFiles, scan: Scan, config: CleanConfig, confounds: Any, sample_mask: Any,
    cache_mask: Voxels | None,
) -> RunPart:  # fmt: skip
    """What is to be done to ``run``. confounds : (T, k), a ConfoundsConfig, or None."""
    kept = None if sample_mask is None else _volumes(sample_mask, scan, run)
    if isinstance(confounds, ConfoundsConfig):
        found = read_confounds(run, confounds)
        confounds = None if found is None else found.values
        if found is not None and found.kept is not None:
            kept = found.kept if kept is None else np.intersect1d(kept, found.kept)
    return RunPart(
        scan=scan,
        cache_mask=cache_mask,
        config=replace(config, t_r_s=config.t_r_s or scan.tr_s),
        confounds=None if confounds is None else _confounds(confounds, scan, run),
        kept=kept,
    )


def _confounds(values: Any, scan: Scan, run: RunFiles) -> NDArray[np.float64]:
    matrix = np.asarray(values, np.float64)
    matrix = matrix[:, np.newaxis] if matrix.ndim == 1 else matrix
    if matrix.ndim != 2 or len(matrix) != scan.n_volumes:
        raise InputError(
            f"confounds of {run.name} have shape {matrix.shape}, the scan {scan.n_volumes} volumes; "
            "give one row a volume"
        )
    return matrix


def _volumes(sample_mask: Any, scan: Scan, run: RunFiles) -> NDArray[np.int64]:
    values = np.asarray(sample_mask)
    if values.dtype == np.bool_:
        if values.shape != (scan.n_volumes,):
            raise InputError(
                f"sample_mask of {run.name} has shape {values.shape}, the scan {scan.n_volumes} "
                "volumes; give one a volume, or the numbers of those to keep"
            )
        return np.flatnonzero(values).astype(np.int64)
    return values.astype(np.int64)


def extract(
    parts: Sequence[RunPart],
    voxels: Voxels,
    placement: Placement,
    cache: Cache,
    new_map: Callable[[str, tuple[int, ...]], MemoryMappedArray],
    say: Say,
) -> RoiSeries:
    """Read and clean each of ``parts``. new_map : (name, shape) -> a new float32 array in a file."""
    volumes = [part.volumes() for part in parts]
    edges = np.cumsum([0, *map(len, volumes)])
    shape = (voxels.size, int(edges[-1]))
    target = new_map("series", shape) if placement.mapped else None
    out = target.array if target is not None else None
    if out is None and not _cleaned_in_place(parts, volumes):
        out = np.empty(shape, np.float32)
    bad = np.zeros((2, voxels.size), np.bool_)
    try:
        for part, lo, hi in zip(parts, edges[:-1], edges[1:], strict=True):
            with _read(part, voxels, placement, cache, new_map, say) as series:
                cleaned = part.clean(series, series if out is None else out[:, lo:hi])
            bad |= cleaned.not_finite, cleaned.constant
    except BaseException:
        if target is not None:
            target.cleanup()
        raise
    return RoiSeries(
        values=(cleaned.values if out is None else out).T,
        run=np.repeat(np.arange(len(parts)), [len(rows) for rows in volumes]),
        volume=np.concatenate(volumes),
        voxels=voxels,
        not_finite=bad[0],
        constant=bad[1],
    )


def _cleaned_in_place(parts: Sequence[RunPart], volumes: Sequence[NDArray[np.int64]]) -> bool:
    """One run that keeps its volumes: what was read is not wanted besides, and its pages are there."""
    return len(parts) == 1 and len(volumes[0]) == parts[0].scan.n_volumes


@contextmanager
def _read(
    part: RunPart,
    voxels: Voxels,
    placement: Placement,
    cache: Cache,
    new_map: Callable[[str, tuple[int, ...]], MemoryMappedArray],
    say: Say,
) -> Iterator[NDArray[np.float32]]:
    """(n_voxels, T) scaled series of one run, for the length of the block."""
    if not placement.mapped:
        found = obtain(
            part.scan,
            {"roi": voxels},
            mask_flat=part.cache_mask,
            cache_dir=cache.folder,
            quota_bytes=cache.quota_bytes,
            use_memmap=cache.use_memmap,
            say=say,
        )
        yield found.scaled("roi")
        return
    folder = cache.folder or cache.spill
    with (
        new_map("raw", (voxels.size, part.scan.n_volumes)) as series,
        build(part.scan, part.cache_mask, folder, quota_bytes=cache.quota_bytes, say=say) as store,
    ):
        step = max(1, _BLOCK_BYTES // (4 * part.scan.n_volumes))
        for lo in range(0, voxels.size, step):
            series.array[lo : lo + step] = store.scaled(voxels[lo : lo + step])
        store.close()
        yield series.array
