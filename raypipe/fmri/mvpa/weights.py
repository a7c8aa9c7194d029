"""A linear model's weights as maps over the ROI's voxels, and the patterns they stand for.

A weight may be large to cancel noise. What the signal looks like is the pattern, the weights times the
voxels' covariance (Haufe 2014): that is the map to interpret.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import InputError
from raypipe.fmri.mvpa.config import MvpaConfig
from raypipe.fmri.mvpa.design import Design
from raypipe.fmri.mvpa.engines import scaled
from raypipe.fmri.mvpa.estimators import decides_by_pairs
from raypipe.fmri.mvpa.folds import Fold

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class Weights:
    """names : (m,) what each map is of; weights, patterns : (m, n_voxels), NaN for voxels left out."""

    names: tuple[str, ...]
    weights: Floats
    patterns: Floats

    def spread(self, places: NDArray[np.bool_]) -> Weights:
        """The same over all voxels, of which those of ``places`` (n_all_voxels,) have values."""
        if places.all():
            return self
        wide = [np.full((len(maps), len(places)), np.nan) for maps in (self.weights, self.patterns)]
        for whole, maps in zip(wide, (self.weights, self.patterns), strict=True):
            whole[:, places] = maps
        return Weights(names=self.names, weights=wide[0], patterns=wide[1])


def weight_maps(patterns: Floats, design: Design, config: MvpaConfig) -> Weights:
    """Weights of the model fitted to all samples, scaled as in a fold; for maps, not for scores.

    patterns : (n, n_voxels). Raises InputError for a model without weights.
    """
    finite = np.atleast_1d(np.isfinite(patterns).all(axis=0))
    usable = np.asarray(patterns if finite.all() else patterns[:, finite], np.float64)
    every = Fold(train=np.arange(len(design)), test=np.arange(0))
    values, _ = scaled(usable, every, config.scale)
    del usable
    coefficients, pairs = _fitted(values, design, config)
    return Weights(
        names=_names(design, len(coefficients), pairs),
        weights=coefficients,
        patterns=haufe_patterns(values, coefficients),
    ).spread(finite)


def _fitted(values: Floats, design: Design, config: MvpaConfig) -> tuple[Floats, bool]:
    """(m, n_voxels) weights, and whether each is of a pair of classes; the model itself goes, and what it
    kept of ``values``.
    """
    model = config.model.build().fit(values, design.encoded())
    if not hasattr(model, "coef_"):
        raise InputError(f"estimator {config.model.estimator} has no weights; choose a linear one")
    coefficients = np.atleast_2d(np.asarray(model.coef_, np.float64))
    if coefficients.shape[1] != values.shape[1]:
        raise InputError(
            f"estimator {config.model.estimator} has {coefficients.shape[1]} weights for {values.shape[1]} "
            "voxels; choose one that keeps all of them"
        )
    return coefficients, decides_by_pairs(model)


def haufe_patterns(values: Floats, weights: Floats) -> Floats:
    """values : (n, v); weights : (m, v) -> (m, v), cov(values) W cov(W' values)^-1, without (v, v)."""
    centred = values - values.mean(axis=0)
    signals = centred @ weights.T  # (n, m)
    patterns: Floats = np.linalg.pinv(signals.T @ signals) @ (signals.T @ centred)
    return patterns


def _names(design: Design, n_maps: int, pairs: bool) -> tuple[str, ...]:
    classes = design.classes
    if not classes:
        return ("target",)
    if n_maps == 1:
        return (f"{classes[1]} over {classes[0]}",)
    return tuple(f"{a} over {b}" for a, b in combinations(classes, 2)) if pairs else classes
