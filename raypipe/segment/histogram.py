"""Scores as histograms: precision-recall area and the best threshold, in memory that never grows.

A pixel's score is the logit of its probability; the histogram has 2048 bins of 1/64 from -16 to 16
(probabilities 1e-7 to 1 - 1e-7), even in the logit, because probabilities crowd at 0 and 1. Within
a bin the order of pixels is lost: `average_precision` takes them as tied, and
`average_precision_bounds` says between which values the area of the single scores must lie.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from raypipe.errors import InputError

BINS = 2048
LIMIT = 16.0
_WIDTH = 2 * LIMIT / BINS


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """``probability``: foreground is what is at least as probable; ``dice``: what that gives."""

    probability: float
    dice: float


def class_scores(logits: Tensor) -> Tensor:
    """(b, K, h, w) float32: each class's logit against all others; for K = 1 the logit itself.

    The sigmoid of it is the softmax's probability, also where that rounds to 1.
    """
    logits = logits.float()
    n_classes = logits.shape[1]
    if n_classes == 1:
        return logits
    others = [[j for j in range(n_classes) if j != k] for k in range(n_classes)]
    rest = [torch.logsumexp(logits[:, other], dim=1) for other in others]
    return logits - torch.stack(rest, dim=1)


def score_histogram(scores: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    """(b, K, 2, BINS) float64: how many valid pixels of an image, outside and inside the class.

    scores : (b, K, h, w). truth : (b, K, h, w) bool. valid : (b, h, w) bool. NaN counts as the
    lowest score, as `raypipe.segment.metrics.predict_labels` takes it: the loss is what reports it.
    """
    b, n_classes = scores.shape[:2]
    places = ((scores.nan_to_num(nan=-LIMIT) + LIMIT) / _WIDTH).floor()
    bins = places.clamp(0, BINS - 1).long()
    groups = torch.arange(b * n_classes, device=scores.device).view(b, n_classes, 1, 1)
    cells = (groups * 2 + truth) * BINS + bins
    beyond = b * n_classes * 2 * BINS  # where pixels go that do not count
    cells = torch.where(valid[:, None], cells, beyond)
    counts = torch.bincount(cells.flatten(), minlength=beyond + 1)[:beyond]
    return counts.view(b, n_classes, 2, BINS).double()


def average_precision(histogram: Tensor) -> Tensor:
    """Area under the precision-recall curve by steps, as scikit-learn's; NaN without positives.

    histogram : (..., 2, BINS) -> (...) float64.
    """
    true, false = _counts_above(histogram)
    gained = histogram[..., 1, :].flip(-1)
    precision = true / (true + false).clamp(min=1)
    return (gained * precision).sum(-1) / true[..., -1]


def average_precision_bounds(histogram: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the most that the area of the single scores can be; (...) float64 each.

    In a bin the i-th positive is found, at worst, after all of the bin's negatives, and at best
    with all of its positives and none of the negatives.
    """
    true, false = _counts_above(histogram)
    gained, lost = histogram[..., 1, :].flip(-1), histogram[..., 0, :].flip(-1)
    before = true - gained
    # sum over i = 1..gained of (before + i) / (before + i + false)
    series = torch.digamma(true + false + 1) - torch.digamma(before + false + 1)
    least = gained - false * series
    most = gained * true / (true + false - lost).clamp(min=1)
    return least.sum(-1) / true[..., -1], most.sum(-1) / true[..., -1]


def best_threshold(histogram: Tensor) -> Threshold:
    """The probability that separates with the highest Dice over all pixels; of equals the middle one.

    histogram : (2, BINS), of validation images. Raises InputError when no pixel is foreground.
    """
    true, false = (counts.flip(-1) for counts in _counts_above(histogram))
    positives = float(true[0])
    if positives == 0:
        raise InputError(
            "no foreground pixel among the validation masks: a threshold cannot be chosen;"
            " validate on images that show some"
        )
    dice = 2 * true / (positives + true + false)
    best = torch.nonzero(dice == dice.max()).flatten()
    edge = int(best[len(best) // 2])
    score = -LIMIT + edge * _WIDTH
    probability = 0.0 if edge == 0 else 1 / (1 + math.exp(-score))
    return Threshold(probability=probability, dice=float(dice[edge]))


def _counts_above(histogram: Tensor) -> tuple[Tensor, Tensor]:
    """True and false positives, (..., BINS) each, as the threshold falls to each bin's lower edge."""
    falling = histogram.flip(-1).cumsum(-1)
    return falling[..., 1, :], falling[..., 0, :]
