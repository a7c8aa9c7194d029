"""From subjects to the population: t test, sign-flip permutation, false discovery rate.

One value a subject and map place (a voxel, an ROI, a target): a score less chance, a contrast. The
subjects are the sample; what varies within one is settled before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from raypipe.errors import InputError

Floats = NDArray[np.float64]
Alternative = Literal["greater", "two-sided", "less"]

_BLOCK_BYTES = 64 << 20  # of permuted statistics held at once
_SAME = 1 - 1e-9  # a statistic that differs by rounding counts as equal


@dataclass(frozen=True, eq=False, kw_only=True)
class GroupResult:
    """t, p : (m,) of each place; mean : (m,); n_subjects; NaN where a subject has no number."""

    t: Floats
    p: Floats
    mean: Floats
    n_subjects: int


@dataclass(frozen=True, eq=False, kw_only=True)
class SignFlipResult:
    """p : (m,) of each place alone; p_fwe : (m,) against the largest of all places; exact : all flips."""

    t: Floats
    p: Floats
    p_fwe: Floats
    n_flips: int
    exact: bool


def one_sample_t(
    values: ArrayLike, *, chance: float = 0.0, alternative: Alternative = "greater"
) -> GroupResult:
    """Student's t of subjects against ``chance``. values : (n_subjects, m) or (n_subjects,)."""
    data = _checked(values) - chance
    n = len(data)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = data.mean(axis=0) / (data.std(axis=0, ddof=1) / np.sqrt(n))
    tail = {"greater": stats.t.sf(t, n - 1), "less": stats.t.cdf(t, n - 1)}
    p = tail[alternative] if alternative in tail else 2 * stats.t.sf(np.abs(t), n - 1)
    return GroupResult(t=t, p=p, mean=data.mean(axis=0) + chance, n_subjects=n)


def sign_flip(
    values: ArrayLike,
    *,
    chance: float = 0.0,
    n_flips: int = 5000,
    seed: int = 0,
    alternative: Alternative = "greater",
) -> SignFlipResult:
    """Permutation test of t by flipping subjects' signs, which under the null are as good as any.

    All 2**n sign patterns are used when they are no more than ``n_flips``, else that many drawn ones
    and the measured one. values : (n_subjects, m) or (n_subjects,).
    """
    data = _checked(values) - chance
    n, places = data.shape
    square = (data**2).sum(axis=0)
    t = _t(data.mean(axis=0), square, n)
    measured = _tailed(t, alternative)
    exact = n < 63 and 2**n <= n_flips
    total = 2**n if exact else n_flips
    above, above_all = np.zeros(places, np.int64), np.zeros(places, np.int64)
    limit = np.where(measured > 0, measured * _SAME, measured / _SAME)
    for signs in _signs(n, total, exact, seed, max(1, _BLOCK_BYTES // (8 * places))):
        flipped = _tailed(_t(signs @ data / n, square, n), alternative)
        above += (flipped >= limit).sum(axis=0)
        largest = np.fmax.reduce(flipped, axis=1)  # places without a number have no say
        above_all += (largest[:, np.newaxis] >= limit).sum(axis=0)
    extra = 0 if exact else 1  # the measured signs are among all, not among drawn ones
    undefined = np.isnan(t)
    p, p_fwe = ((count + extra) / (total + extra) for count in (above, above_all))
    p[undefined], p_fwe[undefined] = np.nan, np.nan
    return SignFlipResult(t=t, p=p, p_fwe=p_fwe, n_flips=total, exact=exact)


def false_discovery_rate(p: ArrayLike) -> Floats:
    """Benjamini and Hochberg's adjusted p of each; NaN stays NaN and does not count."""
    values = np.asarray(p, np.float64)
    adjusted = np.full(values.shape, np.nan)
    defined = ~np.isnan(values)
    known = values[defined]
    if ((known < 0) | (known > 1)).any():
        raise InputError("a p value lies outside 0..1; give p values, not t or scores")
    order = np.argsort(known)[::-1]
    rank = np.arange(known.size, 0, -1)
    steps = np.minimum.accumulate(known[order] * known.size / rank)
    back = np.empty_like(steps)
    back[order] = np.minimum(steps, 1.0)
    adjusted[defined] = back
    return adjusted


def _checked(values: ArrayLike) -> Floats:
    data = np.asarray(values, np.float64)
    if data.ndim == 1:
        data = data[:, np.newaxis]
    if data.ndim != 2 or len(data) < 2:
        raise InputError(
            f"values have shape {data.shape}; give (subjects, places) of two subjects or more"
        )
    return data


def _t(mean: Floats, square: Floats, n: int) -> Floats:
    """t of means (…, m) whose subjects' squares sum to ``square`` (m,); 0/0 is NaN."""
    spread = np.maximum(square / n - mean**2, 0.0) / (n - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t: Floats = mean / np.sqrt(spread)
    return t


def _tailed(t: Floats, alternative: Alternative) -> Floats:
    """The statistic whose large values speak against the null."""
    if alternative == "two-sided":
        return np.abs(t)
    return t if alternative == "greater" else -t


def _signs(n: int, total: int, exact: bool, seed: int, step: int) -> Iterator[Floats]:
    """Yield (up to ``step``, n) of -1 and 1: all patterns, or ``total`` drawn ones."""
    rng = np.random.default_rng(seed)
    for first in range(0, total, step):
        rows = min(step, total - first)
        if exact:
            numbers = np.arange(first, first + rows)[:, np.newaxis]
            bits = (numbers >> np.arange(n)) & 1
        else:
            bits = rng.integers(0, 2, (rows, n))
        yield 1.0 - 2.0 * bits.astype(np.float64)
