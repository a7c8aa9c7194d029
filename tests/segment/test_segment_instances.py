"""Objects: cut from masks against scipy and by hand; AP against a loop over pairs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from raypipe.errors import ConfigError, InputError
from raypipe.segment.instances import (
    InstanceConfig,
    average_precision_of,
    instance_metrics,
    instances_of,
    match,
    overlaps,
)


def iou_by_loop(true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """(n_true, n_predicted), pixel sets compared one pair at a time."""
    ts, ps = ([n for n in np.unique(image) if n] for image in (true, predicted))
    table = np.zeros((len(ts), len(ps)))
    for (i, t), (j, p) in itertools.product(enumerate(ts), enumerate(ps)):
        a, b = true == t, predicted == p
        table[i, j] = (a & b).sum() / (a | b).sum()
    return table


def pairs_by_loop(iou: np.ndarray, threshold: float) -> int:
    """The most pairs above ``threshold``, by trying every way to pair."""
    small, large = (iou, iou.shape) if iou.shape[0] <= iou.shape[1] else (iou.T, iou.T.shape)
    ways = itertools.permutations(range(large[1]), large[0])
    return max(sum(bool(small[i, j] > threshold) for i, j in enumerate(way)) for way in ways)


def blobs(seed: int, n: int) -> np.ndarray:
    """(14, 14) of up to n rectangles, later ones over earlier ones; numbers have gaps."""
    rng = np.random.default_rng(seed)
    image = np.zeros((14, 14), np.int32)
    for number in range(n):
        y, x = rng.integers(0, 11, 2)
        h, w = rng.integers(2, 7, 2)
        image[y : y + h, x : x + w] = 3 * number + 2
    return image


@settings(max_examples=60)
@given(st.integers(0, 999), st.integers(0, 5), st.integers(0, 5))
def test_overlaps_and_pairs_equal_the_loop(seed: int, n_true: int, n_predicted: int) -> None:
    true, predicted = blobs(seed, n_true), blobs(seed + 1, n_predicted)
    if seed % 3 == 0 and n_true:  # mostly the same objects, some moved
        predicted = np.roll(true, seed % 2, axis=1)
    table = iou_by_loop(true, predicted)
    assert np.allclose(overlaps(true, predicted).toarray(), table)
    thresholds = (0.05, 0.2, 0.5, 0.75)
    found = match(true, predicted, thresholds)
    assert (found.n_true, found.n_predicted) == table.shape
    for threshold, pairs in zip(thresholds, found.pairs, strict=True):
        expected = pairs_by_loop(table, threshold) if table.size else 0
        assert pairs == expected
        false_positives, missed = table.shape[1] - expected, table.shape[0] - expected
        if sum(table.shape):
            ap = expected / (expected + false_positives + missed)
            assert average_precision_of(found)[threshold] == pytest.approx(ap)


def test_an_overlap_of_exactly_the_threshold_is_no_pair() -> None:
    true, predicted = np.zeros((2, 4), int), np.zeros((2, 4), int)
    true[:, :2], predicted[0, :2] = 1, 1  # 2 of 4 pixels
    assert match(true, predicted, (0.5, 0.49)).pairs == (0, 1)


def test_images_are_summed_as_objects_not_as_means() -> None:
    one, two = blobs(3, 4), blobs(8, 1)
    nothing = np.zeros_like(two)
    found = instance_metrics([match(one, one), match(two, nothing)])
    n_one, n_two = len(np.unique(one)) - 1, len(np.unique(two)) - 1
    assert found["ap_50"] == found["ap_95"] == pytest.approx(n_one / (n_one + n_two))
    assert found["n_true"] == n_one + n_two and found["n_predicted"] == n_one
    with pytest.raises(InputError, match="no image"):
        instance_metrics([])


def test_an_empty_picture_has_no_score() -> None:
    nothing = np.zeros((3, 3), int)
    assert np.isnan(average_precision_of(match(nothing, nothing, (0.5,)))[0.5])


@pytest.mark.parametrize("connectivity", [1, 2])
def test_components_equal_scipys(connectivity: Any) -> None:
    mask = np.random.default_rng(0).random((40, 50)) < 0.45
    found = instances_of(mask, InstanceConfig(connectivity=connectivity))
    structure = ndimage.generate_binary_structure(2, connectivity)
    expected, n = ndimage.label(mask, structure)
    assert found.max() == n
    assert np.array_equal(found, expected)


def disks(*centres: tuple[int, int], radius: int = 12) -> np.ndarray:
    y, x = np.mgrid[:64, :96]
    return np.any([(y - a) ** 2 + (x - b) ** 2 <= radius**2 for a, b in centres], axis=0)


def test_a_watershed_parts_touching_disks_that_components_join() -> None:
    mask = disks((32, 30), (32, 50), (32, 80))
    joined = instances_of(mask, InstanceConfig())
    parted = instances_of(mask, InstanceConfig(instances="watershed"))
    assert (joined.max(), parted.max()) == (2, 3)
    assert np.array_equal(parted > 0, mask), "nothing is lost"
    cut = parted[32, 30:51]
    border = int(np.flatnonzero(np.diff(cut))[0]) + 30
    assert 38 <= border <= 41, "half way between the centres"


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(0.2, 0.9))
def test_a_watershed_keeps_every_pixel_and_joins_no_components(seed: int, fill: float) -> None:
    noise = np.random.default_rng(seed).random((32, 40))
    mask = ndimage.gaussian_filter(noise, 1.5) > np.quantile(noise, 0.5) * fill
    parted = instances_of(mask, InstanceConfig(instances="watershed"))
    assert np.array_equal(parted > 0, mask)
    islands, _ = ndimage.label(mask)
    for number in range(1, parted.max() + 1):
        assert len(np.unique(islands[parted == number])) == 1


def test_small_objects_are_dropped_and_numbers_close_up() -> None:
    mask = np.zeros((10, 10), bool)
    mask[0, 0], mask[3:6, 3:6], mask[8:, 8:] = True, True, True
    found = instances_of(mask, InstanceConfig(min_area_px=4))
    assert np.bincount(found.ravel()).tolist() == [87, 9, 4]
    assert instances_of(np.zeros((4, 4), bool), InstanceConfig()).max() == 0


@pytest.mark.parametrize(
    "options",
    [{"instances": "x"}, {"connectivity": 3}, {"min_area_px": -1}, {"seed_distance_px": 0.0}],
)
def test_options_that_break_their_rule_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        InstanceConfig(**options)


def test_pictures_of_two_sizes_are_refused() -> None:
    with pytest.raises(InputError, match=r"\(3, 3\).*\(3, 4\)"):
        match(np.zeros((3, 3), int), np.zeros((3, 4), int))
