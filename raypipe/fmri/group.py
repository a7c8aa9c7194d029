"""From subjects to the population: t test, sign-flip permutation, false discovery rate.

One value a subject and map place (a voxel, an ROI, a target): a score less chance, a contrast. The
subjects are the sample; what varies within one is settled before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from threadpoolctl import threadpool_limits

from raypipe.errors import InputError

Floats = NDArray[np.float64]
Alternative = Literal["greater", "two-sided", "less"]

N_FLIPS = 5000  # p is sure to 0.003 at 0.05, and 0.0002 at best
_BLOCK_BYTES = 4 << 20  # of flipped statistics held at once
_PATTERNS = 512  # sign patterns taken at once
_SAME = 1e-12  # of u, which is -1 to 1: what differs by rounding counts as equal


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
    n_flips: int = N_FLIPS,
    seed: int = 0,
    alternative: Alternative = "greater",
) -> SignFlipResult:
    """Permutation test of t by flipping subjects' signs, which under the null are as good as any.

    All 2**n sign patterns are used when they are no more than ``n_flips``, else that many drawn ones
    and the measured one. values : (n_subjects, m) or (n_subjects,).
    """
    data = _checked(values) - chance
    flips = SignFlips(len(data), n_flips=n_flips, seed=seed, alternative=alternative)
    flips.add(data)
    return flips.result()


class SignFlips:
    """``sign_flip`` of places that come in parts, each part under the same sign patterns.

    A place's squares do not change with its signs, so t rises with u, the mean over its root mean square,
    and by one rule for all places: u is one product of matrices, and the highest u has the highest t.
    What is held is one number a place and a pattern, whatever the number of subjects.
    """

    def __init__(
        self,
        n_subjects: int,
        *,
        n_flips: int = N_FLIPS,
        seed: int = 0,
        alternative: Alternative = "greater",
    ) -> None:
        self._signs, self._exact = sign_patterns(n_subjects, n_flips, seed)
        self._alternative: Alternative = alternative
        self._largest = np.full(len(self._signs), -np.inf)
        self._parts: list[
            tuple[Floats, Floats, NDArray[np.int64]]
        ] = []  # u, t, patterns that reach u

    def add(self, values: ArrayLike) -> None:
        """Test ``values`` (n_subjects, m) less chance: the places after those of before."""
        data = _checked(values)
        width = max(1, _BLOCK_BYTES // (8 * min(len(self._signs), _PATTERNS)))
        # Products this thin gain nothing from threads: two that wait for each other took 8 times as long.
        with threadpool_limits(1, "blas"):
            for lo in range(0, data.shape[1], width):
                self._parts.append(self._flip(data[:, lo : lo + width]))

    def _flip(self, data: Floats) -> tuple[Floats, Floats, NDArray[np.int64]]:
        n, places = data.shape
        square = (data**2).sum(axis=0)
        # The others have no t, and no say.
        defined = (square > 0) & np.isfinite(square)
        scaled = data[:, defined] / np.sqrt(n * square[defined])
        own = _tailed(scaled.sum(axis=0), self._alternative)
        above = np.zeros(own.size, np.int64)
        for lo in range(0, len(self._signs) if own.size else 0, _PATTERNS):
            signs = self._signs[lo : lo + _PATTERNS].astype(np.float64)
            flipped = _tailed(signs @ scaled, self._alternative)
            above += (flipped >= own - _SAME).sum(axis=0)
            largest = self._largest[lo : lo + _PATTERNS]
            np.maximum(largest, flipped.max(axis=1), out=largest)
        u, t, reached = np.full(places, np.nan), np.full(places, np.nan), np.zeros(places, np.int64)
        u[defined], reached[defined] = own, above
        t[defined] = _t(data[:, defined].mean(axis=0), square[defined], n)
        return u, t, reached

    def result(self) -> SignFlipResult:
        """Of all places, in the order they came."""
        u, t, above = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        total = len(self._signs)
        below = np.searchsorted(np.sort(self._largest), u - _SAME, side="left")
        extra = 0 if self._exact else 1  # the measured signs are among all, not among drawn ones
        p, p_fwe = ((count + extra) / (total + extra) for count in (above, total - below))
        undefined = np.isnan(u)
        t[undefined], p[undefined], p_fwe[undefined] = np.nan, np.nan, np.nan
        return SignFlipResult(t=t, p=p, p_fwe=p_fwe, n_flips=total, exact=self._exact)


def sign_patterns(n: int, n_flips: int, seed: int) -> tuple[NDArray[np.int8], bool]:
    """((patterns, n) of -1 and 1, whether they are all): all 2**n, or ``n_flips`` drawn ones."""
    if exact := n < 63 and 2**n <= n_flips:
        bits = (np.arange(2**n)[:, np.newaxis] >> np.arange(n)) & 1
    else:
        bits = np.random.default_rng(seed).integers(0, 2, (n_flips, n), np.int8)
    signs: NDArray[np.int8] = bits.astype(np.int8, copy=False)
    signs *= -2
    signs += 1
    return signs, exact


def least_p(n_subjects: int, n_flips: int = N_FLIPS) -> float:
    """The smallest p that sign flips of so many subjects can give: few have few patterns."""
    exact = n_subjects < 63 and 2**n_subjects <= n_flips
    return 1 / 2**n_subjects if exact else 1 / (1 + n_flips)


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
