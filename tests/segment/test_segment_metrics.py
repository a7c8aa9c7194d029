"""Scores of pixels against scikit-learn's, on single pixels and as a stream."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    jaccard_score,
    precision_score,
    recall_score,
)

from raypipe.errors import InputError
from raypipe.segment.histogram import (
    BINS,
    LIMIT,
    average_precision,
    average_precision_bounds,
    best_threshold,
    class_scores,
    score_histogram,
)
from raypipe.segment.metrics import (
    MEASURES,
    PixelScores,
    image_scores,
    metrics_of,
    pixel_sums,
    predict_labels,
)

IGNORED = 9
SCORERS = {
    "dice": f1_score,
    "iou": jaccard_score,
    "precision": precision_score,
    "recall": recall_score,
}


def batch(n_classes: int, seed: int, side: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that know a little of the target; some pixels are ignored."""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, max(2, n_classes), (4, side, side))
    logits = rng.normal(0, 1.5, (4, n_classes, side, side))
    for k in range(n_classes):
        logits[:, k] += 1.5 * (target == (1 if n_classes == 1 else k))
    target[rng.random(target.shape) < 0.1] = IGNORED
    return torch.from_numpy(logits).float(), torch.from_numpy(target)


def histogram_of(scores: np.ndarray, truth: np.ndarray) -> torch.Tensor:
    """(2, BINS) of flat scores."""
    s = torch.from_numpy(scores).float()[None, None, None]
    t = torch.from_numpy(truth)[None, None, None]
    return score_histogram(s, t, torch.ones(1, 1, len(scores), dtype=torch.bool))[0, 0]


@pytest.mark.parametrize("n_classes", [1, 3])
def test_every_image_and_class_equals_scikit_learn(n_classes: int) -> None:
    logits, target = batch(n_classes, 0)
    found = image_scores(logits, target, ignore_label=IGNORED)
    labels = predict_labels(logits).numpy()
    p = class_scores(logits).sigmoid().numpy()
    for i in range(4):
        kept = target[i].numpy() != IGNORED
        for k in range(n_classes):
            which = 1 if n_classes == 1 else k
            true, guess = target[i].numpy()[kept] == which, labels[i][kept] == which
            for name, scorer in SCORERS.items():
                assert float(found[name][i, k]) == pytest.approx(scorer(true, guess)), name
            area = average_precision_score(true, p[i, k][kept])
            assert float(found["pr_auc"][i, k]) == pytest.approx(area, abs=0.02)


@pytest.mark.parametrize("n_classes", [1, 3])
def test_a_stream_equals_all_pixels_at_once(n_classes: int) -> None:
    names = ["dark", "grey", "light"][:n_classes] if n_classes > 1 else []
    scores = PixelScores(n_classes, ignore_label=IGNORED)
    batches = [batch(n_classes, seed) for seed in range(3)]
    for logits, target in batches:
        scores.add(logits, target)
    logits = torch.cat([b[0] for b in batches])
    target = torch.cat([b[1] for b in batches])
    once = metrics_of(pixel_sums(logits, target, ignore_label=IGNORED), names)
    assert scores.metrics(names) == pytest.approx(once, nan_ok=True)

    kept = target.numpy() != IGNORED
    labels, true = predict_labels(logits).numpy()[kept], target.numpy()[kept]
    foreground = [1] if n_classes == 1 else [1, 2]
    for name, scorer in SCORERS.items():
        expected = scorer(true, labels, labels=foreground, average="macro")
        assert once[name] == pytest.approx(expected), name
    images = image_scores(logits, target, ignore_label=IGNORED)
    for name in MEASURES:
        first = 0 if n_classes == 1 else 1
        assert once[f"image_{name}"] == pytest.approx(float(images[name][:, first:].mean()))
    if n_classes == 3:
        by_class = f1_score(true, labels, labels=[0, 1, 2], average=None)
        assert [once[f"dice_{n}"] for n in names] == pytest.approx(list(by_class))


def test_a_score_that_is_not_defined_has_no_share_in_the_mean() -> None:
    logits = torch.full((2, 1, 4, 4), -5.0)
    target = torch.zeros(2, 4, 4)
    logits[1, 0, :2], target[1, :2] = 5.0, 1  # the first image is empty, and seen to be
    found = image_scores(logits, target)
    assert math.isnan(found["dice"][0, 0]) and found["dice"][1, 0] == 1
    metrics = metrics_of(pixel_sums(logits, target))
    assert metrics["image_dice"] == metrics["dice"] == 1
    empty = metrics_of(pixel_sums(logits[:1], target[:1]))
    assert math.isnan(empty["dice"]) and math.isnan(empty["pr_auc"])


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 400), st.floats(0.0, 6.0))
def test_the_histograms_area_is_within_its_bounds_and_exact_for_what_it_keeps(
    seed: int, n: int, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < 0.3
    truth[0] = True
    scores = (rng.normal(0, spread, n) + truth).astype(np.float32)
    histogram = histogram_of(scores, truth)
    kept = np.clip(np.floor((scores + LIMIT) / (2 * LIMIT / BINS)), 0, BINS - 1)
    area = float(average_precision(histogram))
    assert area == pytest.approx(average_precision_score(truth, kept), abs=1e-9)
    low, high = (float(v) for v in average_precision_bounds(histogram))
    assert low - 1e-9 <= average_precision_score(truth, scores) <= high + 1e-9
    assert low - 1e-9 <= area <= high + 1e-9


def test_with_many_pixels_the_bounds_are_narrow() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(200_000) < 0.2
    scores = rng.normal(0, 2, truth.size) + 3 * truth
    histogram = histogram_of(scores, truth)
    low, high = average_precision_bounds(histogram)
    assert float(high - low) < 0.01
    exact = average_precision_score(truth, scores.astype(np.float32))
    assert float(average_precision(histogram)) == pytest.approx(exact, abs=2e-3)


def test_a_class_score_is_the_softmaxs_logit_also_where_that_rounds_to_one() -> None:
    logits = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(class_scores(logits).sigmoid(), logits.softmax(1), atol=1e-6)
    certain = torch.tensor([40.0, 0.0, 0.0]).view(1, 3, 1, 1)
    assert float(class_scores(certain)[0, 0]) == pytest.approx(40 - math.log(2))


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_the_best_threshold_is_the_best_of_all_edges(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.random(300) < rng.uniform(0.05, 0.9)
    truth[:2] = True, False
    scores = (rng.normal(0, 2, 300) + 2 * truth).astype(np.float32)
    found = best_threshold(histogram_of(scores, truth))
    edges = -LIMIT + np.arange(BINS) * (2 * LIMIT / BINS)
    above = scores >= edges[:, None]
    dices = 2 * (above & truth).sum(1) / (above.sum(1) + truth.sum())
    assert found.dice == pytest.approx(dices.max(), abs=1e-12)
    logits = torch.from_numpy(scores)[None, None, None]
    counted = f1_score(truth, predict_labels(logits, found.probability).numpy().ravel())
    assert found.dice == pytest.approx(counted, abs=1e-12)


def test_of_equal_thresholds_the_middle_one_is_taken() -> None:
    truth = np.array([False] * 5 + [True] * 5)
    found = best_threshold(histogram_of(np.where(truth, 6.0, -2.0), truth))
    assert found.dice == 1
    assert math.log(found.probability / (1 - found.probability)) == pytest.approx(2, abs=0.05)


def test_no_foreground_gives_no_threshold() -> None:
    with pytest.raises(InputError, match="no foreground"):
        best_threshold(histogram_of(np.zeros(4), np.zeros(4, bool)))


def test_thresholds_at_the_ends_take_nothing_and_everything() -> None:
    logits = torch.tensor([-50.0, 50.0]).view(1, 1, 1, 2)
    assert predict_labels(logits, 0.0).sum() == 2
    assert predict_labels(logits, 1.0).sum() == 0


def test_scores_that_are_not_numbers_are_no_foreground_and_no_crash() -> None:
    logits = torch.tensor([math.nan, math.inf, -math.inf, 3.0]).view(1, 1, 2, 2)
    target = torch.tensor([[[1, 1], [0, 0]]])
    sums = pixel_sums(logits, target)
    assert sums["counts"].tolist() == [[1, 1, 1]]
    assert sums["scores"][0, 1].nonzero().flatten().tolist() == [0, BINS - 1]
    assert float(sums["scores"].sum()) == 4
