"""``clean``: runs and blocks of voxels through their plan; what was not finite or constant is told.

Series are voxel-major, (n_voxels, T), as the cache holds them. Each block is read once, worked on in
float64 where it fits the processor's cache, and written as float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raypipe.errors import ConfigError, InputError, RaypipeWarning
from raypipe.fmri.clean import plain
from raypipe.fmri.clean.config import CleanConfig
from raypipe.fmri.clean.nuisance import Floats, confound_matrix
from raypipe.fmri.clean.plan import RunPlan, plan_run
from raypipe.fmri.clean.scrub import Rows, volumes_kept

BLOCK_BYTES = 2 << 20  # of float64 a block: about a core's own cache
# Values from which kernels are compiled: below, scipy filters them in less time (35 ns each) than
# loading takes, 1.6 s.
COMPILED_FROM = 16 << 20


@dataclass(frozen=True, eq=False, kw_only=True)
class Cleaned:
    """Cleaned series and what became of voxels and volumes.

    values : (n_voxels, m) float32
    volumes : (m,) the volume of the scan that each column is
    not_finite, constant : (n_voxels,) bool, in at least one run, among the volumes that are left
    """

    values: NDArray[np.float32]
    volumes: Rows
    not_finite: NDArray[np.bool_]
    constant: NDArray[np.bool_]

    def summary(self) -> str:
        """One line for people."""
        n, m = self.values.shape
        return in_words(n, m, self.not_finite, self.constant)


def in_words(
    n_voxels: int,
    n_volumes: int,
    not_finite: NDArray[np.bool_],
    constant: NDArray[np.bool_],
) -> str:
    """What cleaning found, in one line; not_finite, constant : (n_voxels,) bool."""
    return (
        f"{n_voxels} voxels, {n_volumes} volumes; {int(not_finite.sum())} voxels hold NaN or "
        f"infinity, {int(constant.sum())} are constant"
    )


def clean(
    series: NDArray[np.generic],
    config: CleanConfig,
    *,
    confounds: ArrayLike | None = None,
    sample_mask: ArrayLike | None = None,
    runs: ArrayLike | None = None,
    threads: int = 1,
    out: NDArray[np.float32] | None = None,
) -> Cleaned:
    """``nilearn.signal.clean`` of each run, its float64 answer to 1e-5.

    series : (n_voxels, T) of any real type; runs come out in the order of their numbers
    confounds : (T, k); sample_mask : (T,) bool or indices of the volumes to keep; runs : (T,)
    out : where to write (n_voxels, m) float32, e.g. a map, or ``series`` itself; threads : cores to use
    A constant voxel is 0 once standardised; nilearn may scale its rounding error to 1.
    """
    n_voxels, n_volumes = _checked(series, threads)
    matrix = confound_matrix(confounds, n_volumes)
    kept = volumes_kept(sample_mask, n_volumes)
    parts = list(_runs(config, n_volumes, matrix, kept, runs))
    volumes = np.concatenate([rows[plan.scrub.volumes] for rows, plan in parts])
    values = _output(out, (n_voxels, len(volumes)))
    flags = np.zeros(n_voxels, np.uint8)
    lo = 0
    for rows, plan in parts:
        hi = lo + len(plan.scrub.keep)
        _clean_run(series, rows, plan, config, values[:, lo:hi], flags, threads)
        lo = hi
    return Cleaned(
        values=values, volumes=volumes, not_finite=(flags & 1) > 0, constant=(flags & 2) > 0
    )


def _checked(series: NDArray[np.generic], threads: int) -> tuple[int, int]:
    if series.ndim != 2 or series.dtype.kind not in "iuf" or 0 in series.shape:
        raise InputError(
            f"series of shape {series.shape} and type {series.dtype} cannot be cleaned; give real "
            "numbers (voxels, volumes), at least one of each"
        )
    if threads < 1:
        raise ConfigError(f"threads {threads} is below 1; give 1 or more")
    return int(series.shape[0]), int(series.shape[1])


def _output(out: NDArray[np.float32] | None, shape: tuple[int, int]) -> NDArray[np.float32]:
    if out is None:
        return np.empty(shape, np.float32)
    if out.shape != shape or out.dtype != np.float32:
        raise InputError(
            f"out has shape {out.shape} and type {out.dtype}, the cleaned series {shape} float32; "
            "make it so"
        )
    return out


def _runs(
    config: CleanConfig,
    n_volumes: int,
    confounds: Floats | None,
    kept: Rows | None,
    runs: ArrayLike | None,
) -> Iterator[tuple[Rows, RunPlan]]:
    """Yield (volumes of the scan, plan) a run."""
    numbers = np.zeros(n_volumes) if runs is None else np.asarray(runs)
    if numbers.shape != (n_volumes,):
        raise InputError(
            f"runs have shape {numbers.shape}, the series {n_volumes} volumes; give one number a volume"
        )
    for number in np.unique(numbers):
        rows = np.flatnonzero(numbers == number).astype(np.int64)
        own = None if confounds is None else confounds[rows]
        left = None
        if kept is not None:
            left = np.flatnonzero(np.isin(rows, kept)).astype(np.int64)
            if left.size == 0:
                raise InputError(f"sample_mask keeps no volume of run {number}; leave the run out")
        yield rows, plan_run(config, len(rows), own, left)


def _clean_run(
    series: NDArray[np.generic],
    rows: Rows,
    plan: RunPlan,
    config: CleanConfig,
    out: NDArray[np.float32],
    flags: NDArray[np.uint8],
    threads: int,
) -> None:
    """Clean volumes ``rows`` of all voxels into ``out`` (n_voxels, m); set bits of ``flags``."""
    n_voxels = len(series)
    means = np.empty((2, n_voxels))  # before detrending, and of what is left
    mode = _scaling(config, out.shape[1])
    whole = len(rows) == series.shape[1]
    as_it_is = plan.changes_nothing and mode is None and not config.ensure_finite
    if as_it_is and out.shape == series.shape:
        _pass_on(series, out, flags)
        return
    compiled = worth_compiling(*series.shape)
    step = max(64, BLOCK_BYTES // (8 * len(rows)) // 64 * 64)

    def block(lo: int) -> None:
        part = slice(lo, min(lo + step, n_voxels))
        raw = series[part] if whole else series[part][:, rows]
        values = np.ascontiguousarray(raw, dtype=np.float64)
        if config.ensure_finite:
            values = np.where(np.isfinite(values), values, 0.0)
        _clean_block(values, plan, mode, out[part], flags[part], means[:, part], compiled)

    if threads == 1:
        for lo in range(0, n_voxels, step):
            block(lo)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(block, range(0, n_voxels, step)))
    if mode == "psc":
        _percent(out, means, flags)


def _pass_on(
    series: NDArray[np.generic], out: NDArray[np.float32], flags: NDArray[np.uint8]
) -> None:
    """Copy ``series`` as it is, and flag its voxels: a region that is only read costs two looks at it."""
    in_place = np.may_share_memory(series, out)
    step = max(64, BLOCK_BYTES // (4 * series.shape[1]))
    for lo in range(0, len(series), step):
        part = slice(lo, lo + step)
        with np.errstate(invalid="ignore"):  # NaN comes through both
            low, high = series[part].min(axis=1), series[part].max(axis=1)
        finite = np.isfinite(low) & np.isfinite(high)
        flags[part][~finite] |= plain.NOT_FINITE
        flags[part][finite & (low == high)] |= plain.CONSTANT
        if not in_place:
            out[part] = series[part]


def _scaling(config: CleanConfig, n_left: int) -> str | None:
    """What to standardise to; None, with a warning, for a single volume."""
    if n_left == 1 and (config.standardize or config.detrend):
        warnings.warn(
            "one volume is left: it is neither detrended nor standardised, as that would make it 0",
            RaypipeWarning,
            stacklevel=4,
        )
        return None
    return config.standardize


def worth_compiling(n_voxels: int, n_volumes: int) -> bool:
    """Whether the compiled kernels save more than the seconds and memory that loading them takes."""
    return n_voxels * n_volumes >= COMPILED_FROM


def _clean_block(
    values: Floats,
    plan: RunPlan,
    mode: str | None,
    out: NDArray[np.float32],
    flags: NDArray[np.uint8],
    means: Floats,
    compiled: bool,
) -> None:
    """values : (v, T) float64 -> out (v, m); for "psc" centred only, ``_percent`` does the rest."""
    if compiled:
        series, centre = _prepare_compiled(values, plan, means[0], flags)
    else:
        series, centre = plain.prepare(values, plan, means[0], flags), plain.centre
    if plan.basis is not None and plan.basis.shape[1]:
        series -= (series @ plan.basis) @ plan.basis.T
    if mode is None:
        out[:] = series
    else:
        centre(series, flags, mode == "zscore_sample", out, means[1])


def _prepare_compiled(
    values: Floats, plan: RunPlan, means: Floats, flags: NDArray[np.uint8]
) -> tuple[Floats, Callable[..., None]]:
    """``plain.prepare``, and what to centre with, compiled."""
    from raypipe.fmri.clean import kernels  # compiles

    scrub = plan.scrub
    series = np.empty((len(values), len(scrub.keep)))
    kernels.prepare(
        values,
        scrub.enter,
        scrub.keep,
        scrub.fill,
        scrub.start,
        scrub.source,
        scrub.weight,
        plan.detrend,
        plan.sos,
        plan.zi,
        plan.edge,
        series,
        means,
        flags,
    )
    return series, kernels.centre


def _percent(out: NDArray[np.float32], means: Floats, flags: NDArray[np.uint8]) -> None:
    """Scale centred series to percent of their voxel's mean; of the mean before, where it was removed.

    Whether it was is one decision for all voxels of the call, nilearn's: the mean magnitude fell below
    a tenth. Voxels that are not finite have no say in it. A voxel of mean 0 becomes 0, and is told.
    """
    before, after = means
    finite = (flags & 1) == 0
    removed = np.abs(after[finite]).mean() / max(np.abs(before[finite]).mean(), 1e-300) < 0.1
    mean = np.abs(after + before if removed else after)
    zero = mean < np.finfo(np.float64).eps
    if zero.any():
        warnings.warn(
            f"{int(zero.sum())} voxels have mean 0, percent of which means nothing; they become 0",
            RaypipeWarning,
            stacklevel=4,
        )
    scale = np.divide(100.0, mean, out=np.zeros_like(mean), where=~zero)
    out *= scale[:, np.newaxis].astype(np.float32)
