"""``decode``: patterns and a design -> scores of held-out samples, and of permuted labels.

Scaling and fitting see a fold's training samples only.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import ConfigError, InputError, RaypipeWarning
from raypipe.fmri.mvpa.config import MvpaConfig
from raypipe.fmri.mvpa.design import Design, Rows
from raypipe.fmri.mvpa.engines import Answers, Engine, make_engine
from raypipe.fmri.mvpa.estimators import check_fits
from raypipe.fmri.mvpa.folds import Fold, check_folds, make_folds, mixing_danger
from raypipe.fmri.mvpa.permute import p_value, permutations
from raypipe.fmri.mvpa.results import MvpaResult, mean_of_folds
from raypipe.fmri.mvpa.scores import CLASS_SCORES, TARGET_SCORES, chance, rate
from raypipe.fmri.mvpa.weights import weight_maps

Floats = NDArray[np.float64]

_BATCH_BYTES = 32 << 20  # of decision values of permuted labels held at once


def decode(
    patterns: Floats,
    design: Design,
    config: MvpaConfig,
    *,
    folds: Sequence[Fold] | None = None,
    tags: Mapping[str, str] | None = None,
    weights: bool = False,
) -> MvpaResult:
    """Cross-validated decoding of ``design``'s labels from ``patterns``, and its permutation test.

    patterns : (n, n_voxels), e.g. ``design.samples(series)``; voxels that are not finite are left out
    folds : instead of ``config.cv``. Folds that mix runs draw a RaypipeWarning.
    weights : also of one model fitted to all samples: first, while no fold holds patterns of its own, and
    before the permutations, which take long
    """
    usable, finite = _usable(patterns, design)
    check_fits(config.model, design.is_classes)
    names = score_names(design, config)
    if folds is None:
        folds = make_folds(design, config)
    else:
        check_folds(folds, design)
    danger = mixing_danger(folds, design, usable)
    if danger:
        warnings.warn(danger, RaypipeWarning, stacklevel=2)
    maps = weight_maps(usable, design, config).spread(finite) if weights else None
    engines = [make_engine(usable, fold, config.model, config.scale) for fold in folds]
    labels = design.encoded()
    answers = [engine.answer(labels[np.newaxis]) for engine in engines]
    by_fold = _rate(names, labels[np.newaxis], folds, answers)
    null = _null(names, labels, folds, engines, design, config)
    predicted = _pooled(labels, folds, answers)
    scores = {name: values[:, 0] for name, values in by_fold.items()}
    return MvpaResult(
        estimator=config.model.estimator,
        cv=config.cv,
        n_samples=len(design),
        n_voxels=usable.shape[1],
        seed=config.seed,
        exchange=config.exchange,
        classes=design.classes,
        folds=scores,
        chance={name: chance(name, _counts(labels)) for name in names},
        null=null,
        p={name: p_value(mean_of_folds(scores[name]), null[name]) for name in null},
        confusion=_confusion(labels, predicted) if design.is_classes else None,
        true=labels,
        predicted=predicted,
        warnings=(danger,) if danger else (),
        tags=dict(tags or {}),
        weights=maps,
    )


def _usable(patterns: Floats, design: Design) -> tuple[Floats, NDArray[np.bool_]]:
    """(n, voxels left) float64 without voxels that are not finite, and which are (n_voxels,)."""
    values = np.asarray(patterns, np.float64)
    if values.ndim != 2 or len(values) != len(design):
        raise InputError(
            f"patterns have shape {values.shape}, the design {len(design)} samples; give one row a "
            "sample: design.samples(series)"
        )
    finite = np.atleast_1d(np.isfinite(values).all(axis=0))
    if not finite.any():
        raise InputError(f"none of {values.shape[1]} voxels is finite; choose another ROI")
    return (values if finite.all() else np.ascontiguousarray(values[:, finite])), finite


def score_names(design: Design, config: MvpaConfig) -> tuple[str, ...]:
    """The scores asked for, or all that fit; raises ConfigError for one that does not."""
    fitting = CLASS_SCORES if design.is_classes else TARGET_SCORES
    wrong = [name for name in config.scores if name not in fitting]
    if wrong:
        raise ConfigError(
            f"score {wrong[0]} does not fit this design; choose of {', '.join(fitting)}"
        )
    return config.scores or fitting


def _rate(
    names: Sequence[str],
    labels: NDArray[np.generic],
    folds: Sequence[Fold],
    answers: Sequence[Answers],
) -> dict[str, Floats]:
    """labels : (p, n) -> score -> (n_folds, p)."""
    return {
        name: np.stack(
            [
                rate(name, labels[:, fold.test], answer.predicted, answer.decision)
                for fold, answer in zip(folds, answers, strict=True)
            ]
        )
        for name in names
    }


def _null(
    names: Sequence[str],
    labels: NDArray[np.generic],
    folds: Sequence[Fold],
    engines: Sequence[Engine],
    design: Design,
    config: MvpaConfig,
) -> dict[str, Floats]:
    """Score -> (n_permutations,) means over folds; a batch of permutations at a time."""
    if config.n_permutations == 0:
        return {}
    k = len(design.classes)
    most = max(1, k, k * (k - 1) // 2)  # a value a class, or a pair of classes
    batch = max(1, _BATCH_BYTES // (8 * len(design) * most))
    parts: dict[str, list[Floats]] = {name: [] for name in names}
    for first in range(0, config.n_permutations, batch):
        n = min(batch, config.n_permutations - first)
        drawn: Rows = permutations(
            design, n, exchange=config.exchange, seed=config.seed, first=first
        )
        permuted = labels[drawn]
        answers = [engine.answer(permuted) for engine in engines]
        for name, values in _rate(names, permuted, folds, answers).items():
            parts[name].append(_mean_defined(values))
    return {name: np.concatenate(values) for name, values in parts.items()}


def _mean_defined(values: Floats) -> Floats:
    """(n_folds, p) -> (p,) means of what is defined; NaN where nothing is."""
    count = (~np.isnan(values)).sum(axis=0)
    total = np.nansum(values, axis=0)
    return np.divide(total, count, out=np.full(values.shape[1], np.nan), where=count > 0)


def _pooled(
    labels: NDArray[np.generic], folds: Sequence[Fold], answers: Sequence[Answers]
) -> NDArray[np.generic]:
    """(n,) the prediction of each sample by the fold that tested it (the last, if several did)."""
    untested = -1 if labels.dtype.kind == "i" else np.nan
    pooled: NDArray[np.generic] = np.full(len(labels), untested, labels.dtype)
    for fold, answer in zip(folds, answers, strict=True):
        pooled[fold.test] = answer.predicted[0]
    return pooled


def _confusion(labels: NDArray[np.generic], predicted: NDArray[np.generic]) -> NDArray[np.int64]:
    true, answer = labels.astype(np.int64), predicted.astype(np.int64)
    k = int(true.max()) + 1
    tested = answer >= 0
    counts = np.zeros((k, k), np.int64)
    np.add.at(counts, (true[tested], answer[tested]), 1)
    return counts


def _counts(labels: NDArray[np.generic]) -> NDArray[np.int64]:
    """How many samples each class has; one count for a regression target."""
    if labels.dtype.kind != "i":
        return np.array([len(labels)])
    return np.bincount(labels.astype(np.int64))
