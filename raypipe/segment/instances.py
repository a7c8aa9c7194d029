"""Objects cut out of a mask, and how many of them are found.

`components` and `watershed` turn a foreground mask into numbered objects; `match` pairs predicted
with true ones, and `average_precision_of` sums up. The score is the one of cell segmentation:

    AP(t) = TP / (TP + FP + FN)      TP: pairs of IoU above t, each object in one pair at most

(Caicedo et al. 2019, Nature Methods 16:1247, the 2018 Data Science Bowl; also Schmidt et al. 2018,
StarDist). It is not the area under a curve of that name: an object has no score here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse
from scipy.sparse.csgraph import maximum_bipartite_matching

from raypipe.errors import ConfigError, InputError

Labels = NDArray[np.int32]

# The Data Science Bowl's: from 0.5 to 0.95.
THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))


@dataclass(frozen=True, kw_only=True)
class InstanceConfig:
    """How a mask is cut into objects. Raises ConfigError when a value breaks its rule."""

    instances: Literal["components", "watershed"] = "components"
    """Connected pixels, or those split at necks by a watershed of the distance to the border."""
    connectivity: Literal[1, 2] = 1
    """Neighbours of a pixel: 1, the four beside it; 2, the corners too."""
    min_area_px: int = 0
    """Smaller objects are dropped."""
    seed_distance_px: float = 5.0
    """Watershed: the least distance between the centres of two objects."""
    seed_smooth_px: float = 1.0
    """Watershed: standard deviation by which the distances are smoothed, against split centres."""

    def __post_init__(self) -> None:
        checks = {
            "instances": (self.instances in ("components", "watershed"), "components or watershed"),
            "connectivity": (self.connectivity in (1, 2), "give 1 or 2"),
            "min_area_px": (self.min_area_px >= 0, "give 0 or more"),
            "seed_distance_px": (self.seed_distance_px >= 1, "give at least 1"),
            "seed_smooth_px": (self.seed_smooth_px >= 0, "give 0 or more"),
        }
        for name, (holds, rule) in checks.items():
            if not holds:
                raise ConfigError(f"{name}={getattr(self, name)!r}: {rule}")


@dataclass(frozen=True, kw_only=True)
class Matches:
    """Objects of one or more images: at each threshold the pairs found, and the objects there are."""

    thresholds: tuple[float, ...]
    pairs: tuple[int, ...]
    n_true: int
    n_predicted: int

    def __add__(self, other: Matches) -> Matches:
        """Of both sets of images together."""
        if self.thresholds != other.thresholds:
            raise InputError(
                f"matches at thresholds {self.thresholds} and {other.thresholds}: only equal ones add"
            )
        return Matches(
            thresholds=self.thresholds,
            pairs=tuple(a + b for a, b in zip(self.pairs, other.pairs, strict=True)),
            n_true=self.n_true + other.n_true,
            n_predicted=self.n_predicted + other.n_predicted,
        )


def instances_of(mask: NDArray[np.bool_], config: InstanceConfig) -> Labels:
    """(h, w) int32: 0 background, objects from 1 on without gaps. mask : (h, w) bool."""
    cut = watershed if config.instances == "watershed" else components
    return _without_small(cut(mask, config), config.min_area_px)


def components(mask: NDArray[np.bool_], config: InstanceConfig) -> Labels:
    """Each set of connected pixels is an object; in the order of their first pixels, by rows."""
    from skimage.measure import label

    return np.asarray(label(mask, connectivity=config.connectivity), np.int32)


def watershed(mask: NDArray[np.bool_], config: InstanceConfig) -> Labels:
    """Touching convex objects apart: a basin for each peak of the distance to the background.

    Every set of connected pixels has at least one peak, so nothing of the mask is lost.
    """
    from skimage.feature import peak_local_max
    from skimage.segmentation import watershed as flood

    islands = components(mask, config)
    # Outside the picture is background too: an object at the edge has its peak there otherwise.
    distance = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    height = ndimage.gaussian_filter(distance, config.seed_smooth_px) * mask
    peaks = peak_local_max(
        height,
        min_distance=int(np.ceil(config.seed_distance_px)),
        labels=islands,
        exclude_border=False,
    )
    seeds = np.zeros(mask.shape, np.int32)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    structure = ndimage.generate_binary_structure(2, config.connectivity)
    return np.asarray(flood(-height, seeds, mask=mask, connectivity=structure), np.int32)


def overlaps(true: NDArray[np.integer], predicted: NDArray[np.integer]) -> sparse.csr_array:
    """(n_true, n_predicted) IoU of the pairs of objects that touch, in the order of their numbers.

    Both images : (h, w), 0 background; numbers may have gaps. Raises InputError for unequal shapes.
    """
    if true.shape != predicted.shape:
        raise InputError(
            f"instances of {true.shape} pixels against {predicted.shape}: give the same image"
        )
    numbers_t, t = np.unique(true, return_inverse=True)
    numbers_p, p = np.unique(predicted, return_inverse=True)
    areas_t, areas_p = np.bincount(t.ravel()), np.bincount(p.ravel())
    shape = (len(numbers_t), len(numbers_p))
    shared = sparse.coo_array((np.ones(t.size, np.int64), (t.ravel(), p.ravel())), shape=shape)
    shared.sum_duplicates()
    rows, columns = shared.coords
    iou = shared.data / (areas_t[rows] + areas_p[columns] - shared.data)
    whole = sparse.csr_array((iou, (rows, columns)), shape=shape)
    return whole[np.flatnonzero(numbers_t)][:, np.flatnonzero(numbers_p)]


def match(
    true: NDArray[np.integer],
    predicted: NDArray[np.integer],
    thresholds: Sequence[float] = THRESHOLDS,
) -> Matches:
    """The largest number of pairs of IoU above each threshold, no object in two of them.

    From 0.5 on no object could be in two; below, it is a largest matching of the bipartite graph.
    """
    iou = overlaps(true, predicted)
    pairs = tuple(_pairs(iou, threshold) for threshold in thresholds)
    n_true, n_predicted = iou.shape
    return Matches(
        thresholds=tuple(thresholds), pairs=pairs, n_true=n_true, n_predicted=n_predicted
    )


def average_precision_of(matches: Matches) -> dict[float, float]:
    """AP by threshold: TP / (TP + FP + FN); NaN where there is no object at all."""
    total = matches.n_true + matches.n_predicted
    return {
        threshold: pairs / (total - pairs) if total else float("nan")
        for threshold, pairs in zip(matches.thresholds, matches.pairs, strict=True)
    }


def instance_metrics(images: Iterable[Matches]) -> dict[str, float]:
    """``ap_50`` ... ``ap_95`` and their mean ``ap``, over all objects of ``images``; and the numbers
    of objects ``n_true``, ``n_predicted``. Raises InputError without an image.
    """
    total: Matches | None = None
    for matches in images:
        total = matches if total is None else total + matches
    if total is None:
        raise InputError("no image to score objects in; give at least one")
    found: Mapping[float, float] = average_precision_of(total)
    scores = {f"ap_{round(100 * threshold)}": value for threshold, value in found.items()}
    mean = float(np.mean(list(found.values())))
    return {"ap": mean, **scores, "n_true": total.n_true, "n_predicted": total.n_predicted}


def _pairs(iou: sparse.csr_array, threshold: float) -> int:
    allowed = sparse.csr_array(iou > threshold)
    return int((maximum_bipartite_matching(allowed) >= 0).sum()) if allowed.nnz else 0


def _without_small(labels: Labels, min_area_px: int) -> Labels:
    """Numbers anew, without gaps, for objects of at least ``min_area_px`` pixels."""
    areas = np.bincount(labels.ravel())
    kept = areas >= max(min_area_px, 1)
    kept[0] = False
    numbers = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    return numbers[labels]
