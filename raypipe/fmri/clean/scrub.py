"""Which volumes of a run enter the filter, which are interpolated, which are left: pure decisions.

Without a butterworth filter scrubbed volumes are simply left out. With one the filter needs even
spacing, so they are interpolated first (Lindquist 2018) and left out after it. A volume's cubic
spline weights on its neighbours fall by about 4 with each, so the few that matter are kept and the
cost stays O(T).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import ConfigError, InputError, RaypipeWarning

Rows = NDArray[np.int64]

_NEGLIGIBLE = 1e-15  # of the largest weight: below float64's own rounding
_CHUNK_BYTES = 32 << 20  # weights computed at once


@dataclass(frozen=True, eq=False, kw_only=True)
class Scrub:
    """What enters a run's series and what leaves it.

    enter : (n,) volumes of the run, in order, that make up the series
    keep : (m,) places in the series that are left in the end
    fill : (f,) places in the series that are interpolated; place fill[i] is the sum of weight[j] times
        place source[j] for j in [start[i], start[i + 1])
    splined : places where confounds are read off the spline: ``fill``, and in nilearn also some that
        are kept and so do not change but for rounding
    """

    enter: Rows
    keep: Rows
    fill: Rows
    start: Rows
    source: Rows
    weight: NDArray[np.float64]
    splined: Rows

    @property
    def volumes(self) -> Rows:
        """The volumes of the run that are left, (m,)."""
        return self.enter[self.keep]


def volumes_kept(sample_mask: object, n_volumes: int) -> Rows | None:
    """``sample_mask``, (T,) bool or rising indices, as indices; None for None.

    Raises InputError for another shape, an index outside the run, none left, or not in order.
    """
    if sample_mask is None:
        return None
    mask = np.asarray(sample_mask)
    if mask.dtype == bool:
        if mask.shape != (n_volumes,):
            raise InputError(
                f"sample_mask has shape {mask.shape}, the series {n_volumes} volumes; give one value "
                "a volume, or the indices of those to keep"
            )
        mask = np.flatnonzero(mask)
    if mask.ndim != 1 or mask.dtype.kind not in "iu" or mask.size == 0:
        raise InputError(
            f"sample_mask of shape {mask.shape} and type {mask.dtype} keeps no volumes; give indices "
            "of those to keep, or one boolean a volume"
        )
    kept = mask.astype(np.int64)
    if kept[0] < 0 or kept[-1] >= n_volumes or (np.diff(kept) <= 0).any():
        raise InputError(
            f"sample_mask must rise within 0..{n_volumes - 1}; it goes from {kept.min()} to "
            f"{kept.max()} in {kept.size} steps: sort it and drop repeated volumes"
        )
    return kept


def censor(n_volumes: int, kept: Rows | None) -> Scrub:
    """Scrubbed volumes are left out at once: nothing is interpolated."""
    enter = np.arange(n_volumes) if kept is None else kept
    return _scrub(enter, np.arange(len(enter)), *_no_fill(), _NONE)


def interpolate(n_volumes: int, kept: Rows | None, *, extrapolate: bool, which: str) -> Scrub:
    """Scrubbed volumes are interpolated for the filter and left out after it.

    which : "all", or "nilearn" (see ``CleanConfig.scrub_interpolation``), which warns where the two
        differ. Raises ConfigError where nilearn would return other volumes than were asked for.
    """
    if kept is None or len(kept) == n_volumes:
        return censor(n_volumes, None)
    if len(kept) < 2:
        raise InputError("sample_mask keeps one volume, too few to interpolate; keep more")
    scrubbed = np.setdiff1d(np.arange(n_volumes), kept)
    raw = np.intersect1d(scrubbed, n_volumes - 1 - scrubbed) if which == "nilearn" else _NONE
    outside = (scrubbed < kept[0]) | (scrubbed > kept[-1])
    left_out = _NONE if extrapolate else np.setdiff1d(scrubbed[outside], raw)
    if raw.size:
        _say_raw(raw, int((left_out < kept[0]).sum()), int(kept[0]), extrapolate)
    enter = np.setdiff1d(np.arange(n_volumes), left_out)
    filled = np.setdiff1d(scrubbed, np.union1d(raw, left_out))
    splined = np.intersect1d(enter, n_volumes - 1 - kept) if which == "nilearn" else filled
    place, fill, read = (np.searchsorted(enter, these) for these in (kept, filled, splined))
    start, source, weight = _spline_weights(kept, filled)
    return _scrub(enter, place, fill, start, place[source], weight, read)


_NONE = np.empty(0, np.int64)


def _say_raw(raw: Rows, left_out: int, first_kept: int, extrapolate: bool) -> None:
    """Raise or warn that nilearn does not interpolate the ``raw`` volumes."""
    named = ", ".join(map(str, raw[:6])) + (", …" if raw.size > 6 else "")
    if not extrapolate and left_out != first_kept:
        raise ConfigError(
            f"volumes {named} are scrubbed and so are their mirror images in the run: nilearn would "
            f"return volumes shifted by {first_kept - left_out}; give scrub_interpolation all"
        )
    warnings.warn(
        f"scrubbed volumes {named} enter the filter as they are, as in nilearn, for their mirror "
        "images in the run are scrubbed too; scrub_interpolation all interpolates them",
        RaypipeWarning,
        stacklevel=2,
    )


def _spline_weights(kept: Rows, filled: Rows) -> tuple[Rows, Rows, NDArray[np.float64]]:
    """CSR (start, source, weight) of the not-a-knot cubic spline through ``kept`` at ``filled``."""
    n = len(kept)
    step = max(1, _CHUNK_BYTES // (8 * n * 4))
    columns = [_columns(kept, filled, lo, min(lo + step, n)) for lo in range(0, n, step)]
    target, source, weight = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    order = np.lexsort((source, target))
    start = np.searchsorted(target[order], np.arange(len(filled) + 1)).astype(np.int64)
    return start, source[order].astype(np.int64), np.ascontiguousarray(weight[order])


def _columns(
    kept: Rows, filled: Rows, lo: int, hi: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """(target, source, weight) that matter of the sources [lo, hi)."""
    from scipy.interpolate import CubicSpline  # slow to import, and seldom needed

    unit = np.zeros((len(kept), hi - lo))
    unit[np.arange(lo, hi), np.arange(hi - lo)] = 1
    weights = CubicSpline(kept.astype(float), unit, extrapolate=True)(filled.astype(float))
    target, source = np.nonzero(np.abs(weights) > _NEGLIGIBLE)
    return target, source + lo, weights[target, source]


def _no_fill() -> tuple[Rows, Rows, Rows, NDArray[np.float64]]:
    return _NONE, np.zeros(1, np.int64), _NONE, np.empty(0)


def _scrub(
    enter: Rows,
    keep: Rows,
    fill: Rows,
    start: Rows,
    source: Rows,
    weight: NDArray[np.float64],
    splined: Rows,
) -> Scrub:
    return Scrub(
        enter=enter.astype(np.int64),
        keep=keep.astype(np.int64),
        fill=fill.astype(np.int64),
        start=start,
        source=source.astype(np.int64),
        weight=weight,
        splined=splined.astype(np.int64),
    )
