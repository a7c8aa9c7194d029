"""Permuted labels within runs, and the p value of a score among those of permuted labels."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raypipe.errors import InputError
from raypipe.fmri.mvpa.design import Design, Rows

# Scores of equal predictions may differ by rounding; such a permutation counts as equal.
_SAME_SCORE = 1e-10


def permutations(design: Design, n: int, *, exchange: str, seed: int, first: int = 0) -> Rows:
    """(n, n_samples) sample numbers: permutation i gives sample j the label of permutation[i, j].

    Labels move within their run only. exchange : "sample", or "block" for whole blocks. Permutation
    first + i depends on ``seed`` and its number alone, so work may be divided anyhow.
    """
    units = design.blocks if exchange == "block" else np.arange(len(design))
    _check_units(design, units)
    _, head, unit = np.unique(units, return_index=True, return_inverse=True)
    groups = [np.flatnonzero(design.runs[head] == run) for run in np.unique(design.runs)]
    drawn = np.empty((n, len(design)), np.int64)
    for i in range(n):
        rng = np.random.default_rng([seed, first + i])
        takes = np.empty(len(head), np.int64)
        for group in groups:
            takes[group] = rng.permutation(group)
        drawn[i] = head[takes][unit]
    return drawn


def _check_units(design: Design, units: Rows) -> None:
    """A block lies in one run and has one label."""
    _, head, unit = np.unique(units, return_index=True, return_inverse=True)
    if (design.runs[head][unit] != design.runs).any():
        raise InputError("a block lies in two runs; number blocks anew in each run")
    if (design.labels[head][unit] != design.labels).any():
        raise InputError("a block holds two labels; permute samples instead: exchange sample")


def p_value(score: float, null: ArrayLike) -> float:
    """(1 + permutations that score as high or higher) / (1 + permutations); NaN for a score of NaN.

    A permutation whose score is undefined counts as high: p is never too small for it.
    """
    if math.isnan(score):
        return math.nan
    values: NDArray[np.float64] = np.asarray(null, np.float64)
    reached = count_reached(np.array([score]), values[np.newaxis])[0]
    return float((1 + reached) / (1 + values.size))


def count_reached(scores: NDArray[np.float64], null: NDArray[np.float64]) -> NDArray[np.int64]:
    """(n,) how many of each row of ``null`` (n, p) score as high as ``scores`` (n,), or are undefined."""
    count: NDArray[np.int64] = ((null >= scores[:, np.newaxis] - _SAME_SCORE) | np.isnan(null)).sum(
        axis=1
    )
    return count
