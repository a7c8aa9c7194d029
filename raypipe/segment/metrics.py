"""Scores of pixels: Dice, IoU, precision, recall and PR-AUC, by class and by image, as a stream.

`pixel_sums` of a batch adds up over batches and workers (float64, of one size whatever was seen);
`metrics_of` makes scores of the sums. Two ways of averaging, and both are given: over all pixels
(``dice``), in which large objects weigh more, and over images (``image_dice``). A score that is not
defined, such as the Dice of a class that is neither there nor predicted, is NaN and has no share in
an average. Objects are scored in ``instances``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from raypipe.segment.histogram import (
    BINS,
    Threshold,
    average_precision,
    average_precision_bounds,
    best_threshold,
    class_scores,
    score_histogram,
)
from raypipe.segment.loss import labels_of

MEASURES = ("dice", "iou", "precision", "recall", "pr_auc")
Sums = Mapping[str, Tensor]


def predict_labels(logits: Tensor, threshold: float = 0.5) -> Tensor:
    """(b, h, w) int64: for one class what is at least ``threshold`` probable, else the likeliest."""
    if logits.shape[1] > 1:
        return logits.argmax(1)
    return (logits[:, 0].float() >= _logit(threshold)).long()


def image_scores(
    logits: Tensor, target: Tensor, *, ignore_label: int | None = None, threshold: float = 0.5
) -> dict[str, Tensor]:
    """``MEASURES`` by name, (b, K) float64: of each image and class; NaN where not defined."""
    counts, histogram = _of_images(logits, target, ignore_label, threshold)
    return _scores(counts, histogram)


def pixel_sums(
    logits: Tensor, target: Tensor, *, ignore_label: int | None = None, threshold: float = 0.5
) -> dict[str, Tensor]:
    """What `metrics_of` needs of a batch, float64, to be added to that of other batches.

    counts : (K, 3), true positives, false positives, false negatives. scores : (K, 2, BINS).
    images : (K, 5, 2), each of ``MEASURES`` summed over the images where it is defined, and how
    many these are. logits and target as in `raypipe.segment.loss`.
    """
    counts, histogram = _of_images(logits, target, ignore_label, threshold)
    by_image = torch.stack([_scores(counts, histogram)[name] for name in MEASURES], dim=-1)
    defined = ~by_image.isnan()
    images = torch.stack([by_image.nan_to_num(0.0).sum(0), defined.double().sum(0)], dim=-1)
    return {"counts": counts.sum(0), "scores": histogram.sum(0), "images": images}


def metrics_of(sums: Sums, names: Sequence[str] = ()) -> dict[str, float]:
    """Scores by name; averages are over foreground classes: all but the first of several.

    ``dice``, ``iou``, ``precision``, ``recall``, ``pr_auc`` of all pixels, ``image_...`` averaged
    over images; with several classes each also by class (``dice_NAME``; ``names`` of the K classes,
    else numbers). ``pr_auc_error``: how far the histogram's area can be from the single scores'.
    """
    pixels = _scores(sums["counts"], sums["scores"])
    low, high = average_precision_bounds(sums["scores"])
    pixels["pr_auc_error"] = torch.maximum(high - pixels["pr_auc"], pixels["pr_auc"] - low)
    total, defined = sums["images"].unbind(-1)
    by_image = torch.where(defined > 0, total / defined, math.nan)
    found = pixels | {f"image_{name}": by_image[:, i] for i, name in enumerate(MEASURES)}
    n_classes = len(sums["counts"])
    first = 0 if n_classes == 1 else 1
    metrics = {name: _mean(values[first:]) for name, values in found.items()}
    if n_classes > 1:
        words = names or [str(k) for k in range(n_classes)]
        for name, values in found.items():
            metrics |= {f"{name}_{word}": float(v) for word, v in zip(words, values, strict=True)}
    return metrics


class PixelScores:
    """Sums of all images seen so far: `pixel_sums`, added up. Takes 100 kB a class."""

    def __init__(
        self, classes: int, *, ignore_label: int | None = None, threshold: float = 0.5
    ) -> None:
        self._how = {"ignore_label": ignore_label, "threshold": threshold}
        self.sums: dict[str, Tensor] = {
            "counts": torch.zeros(classes, 3, dtype=torch.float64),
            "scores": torch.zeros(classes, 2, BINS, dtype=torch.float64),
            "images": torch.zeros(classes, len(MEASURES), 2, dtype=torch.float64),
        }

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Take in a batch; logits (b, K, h, w), target (b, h, w)."""
        found = pixel_sums(logits, target, **self._how)  # type: ignore[arg-type]
        for name, total in self.sums.items():
            total += found[name].cpu()

    def metrics(self, names: Sequence[str] = ()) -> dict[str, float]:
        """As `metrics_of`."""
        return metrics_of(self.sums, names)

    def threshold(self) -> Threshold:
        """The best one for the images seen, which should be those of validation (one class)."""
        return best_threshold(self.sums["scores"][0])


def _of_images(
    logits: Tensor, target: Tensor, ignore_label: int | None, threshold: float
) -> tuple[Tensor, Tensor]:
    """Counts (b, K, 3) and score histograms (b, K, 2, BINS), float64."""
    n_classes = logits.shape[1]
    labels, valid = labels_of(logits, target, ignore_label)
    predicted = predict_labels(logits, threshold)
    which = torch.arange(n_classes, device=logits.device).view(1, -1, 1, 1)
    which = which + 1 if n_classes == 1 else which
    truth = labels[:, None] == which
    guess = (predicted[:, None] == which) & valid[:, None]
    inside = truth & valid[:, None]
    pairs = (guess & inside, guess & ~inside, ~guess & inside)
    counts = torch.stack([pair.sum((2, 3)) for pair in pairs], dim=-1).double()
    return counts, score_histogram(class_scores(logits), truth, valid)


def _scores(counts: Tensor, histogram: Tensor) -> dict[str, Tensor]:
    """``MEASURES`` of counts (..., 3) and histograms (..., 2, BINS): (...) each."""
    tp, fp, fn = counts.unbind(-1)
    return {
        "dice": 2 * tp / (2 * tp + fp + fn),
        "iou": tp / (tp + fp + fn),
        "precision": tp / (tp + fp),
        "recall": tp / (tp + fn),
        "pr_auc": average_precision(histogram),
    }


def _mean(values: Tensor) -> float:
    """Mean of the defined values; NaN without one."""
    return float(values[~values.isnan()].mean())


def _logit(probability: float) -> float:
    """Infinite at 0 and 1: everything, or nothing, is at least as probable."""
    if probability <= 0:
        return -math.inf
    return math.log(probability / (1 - probability)) if probability < 1 else math.inf
