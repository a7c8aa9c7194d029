"""Rates predictions, for many label vectors at once: a thousand permutations are one array.

Arrays are (p, n): p label vectors (permutations, or 1) of n test samples. Decision values are (p, n)
for two classes, (p, n, k) for more. Each score is scikit-learn's; ``roc_auc`` of more than two classes
is the mean of each class against the rest. A score that is undefined is NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

CLASS_SCORES = ("accuracy", "balanced_accuracy", "roc_auc")
TARGET_SCORES = ("r", "r2")


def accuracy(true: Labels, predicted: Labels) -> Floats:
    """(p,) share of samples predicted right."""
    share: Floats = (true == predicted).mean(axis=1)
    return share


def balanced_accuracy(true: Labels, predicted: Labels) -> Floats:
    """(p,) mean over the classes that occur of the share predicted right."""
    right = true == predicted
    recalls = np.full((int(true.max()) + 1, len(true)), np.nan)
    for k in range(len(recalls)):
        own = true == k
        count = own.sum(axis=1)
        np.divide((right & own).sum(axis=1), count, out=recalls[k], where=count > 0)
    mean: Floats = np.nanmean(recalls, axis=0)
    return mean


def roc_auc(true: Labels, decision: Floats) -> Floats:
    """(p,) area under the ROC curve: how often a sample of a class lies above one of another."""
    if decision.ndim == 2:
        return _area(true == 1, decision)
    areas = [_area(true == k, decision[:, :, k]) for k in range(decision.shape[2])]
    mean: Floats = np.mean(areas, axis=0)
    return mean


def _area(positive: NDArray[np.bool_], decision: Floats) -> Floats:
    """(p,) by the rank sum; NaN where one side is empty."""
    ranks = rankdata(decision, axis=1)
    ups = positive.sum(axis=1).astype(np.float64)
    downs = positive.shape[1] - ups
    above = (ranks * positive).sum(axis=1) - ups * (ups + 1) / 2
    area: Floats = np.divide(
        above, ups * downs, out=np.full_like(ups, np.nan), where=ups * downs > 0
    )
    return area


def pearson(true: Floats, predicted: Floats) -> Floats:
    """(p,) correlation; NaN where either is constant."""
    a = true - true.mean(axis=1, keepdims=True)
    b = predicted - predicted.mean(axis=1, keepdims=True)
    norm = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
    r: Floats = np.divide((a * b).sum(axis=1), norm, out=np.full_like(norm, np.nan), where=norm > 0)
    return r


def r_squared(true: Floats, predicted: Floats) -> Floats:
    """(p,) 1 - residual over total sum of squares; NaN where the target is constant."""
    residual = ((true - predicted) ** 2).sum(axis=1)
    total = ((true - true.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    part = np.divide(residual, total, out=np.full_like(total, np.nan), where=total > 0)
    return 1.0 - part


_OF_PREDICTIONS: dict[str, Callable[..., Floats]] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "r": pearson,
    "r2": r_squared,
}


def rate(
    name: str, true: NDArray[np.generic], predicted: NDArray[np.generic], decision: Floats | None
) -> Floats:
    """(p,) the score called ``name``; NaN for roc_auc of a model without decision values."""
    if name != "roc_auc":
        return _OF_PREDICTIONS[name](true, predicted)
    if decision is None:
        return np.full(len(true), np.nan)
    return roc_auc(true.astype(np.int64), decision)


def chance(name: str, counts: NDArray[np.int64]) -> float:
    """What guessing scores, for classes of these counts: for accuracy, always the most frequent."""
    if name == "accuracy":
        return float(counts.max() / counts.sum())
    if name == "balanced_accuracy":
        return 1.0 / len(counts)
    return 0.5 if name == "roc_auc" else 0.0
