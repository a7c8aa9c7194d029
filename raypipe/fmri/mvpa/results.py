"""What a decoding found: frozen, and written as one record (JSON) or as table rows (Parquet)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raypipe.fmri.mvpa.weights import Weights

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class MvpaResult:
    """One decoding: one ROI of one subject for one target.

    folds : score -> (n_folds,); null : score -> (n_permutations,) means over folds; p : score -> p value
    chance : score -> what guessing gives
    confusion : (k, k) test samples of true class (row) predicted as (column), all folds; None for targets
    predicted, true : (n,) in sample order, class numbers or targets; NaN, or -1, for untested samples
    tags : subject, roi, target or what else tells results apart
    weights : of one model fitted to all samples; None where nobody asked
    """

    estimator: str
    cv: str
    n_samples: int
    n_voxels: int
    seed: int
    exchange: str
    classes: tuple[str, ...]
    folds: Mapping[str, Floats]
    chance: Mapping[str, float]
    null: Mapping[str, Floats]
    p: Mapping[str, float]
    confusion: NDArray[np.int64] | None
    true: NDArray[np.generic]
    predicted: NDArray[np.generic]
    warnings: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    weights: Weights | None = None

    @property
    def scores(self) -> dict[str, float]:
        """Score -> mean over folds in which it is defined; NaN where it is in none."""
        return {name: mean_of_folds(values) for name, values in self.folds.items()}

    def to_dict(self) -> dict[str, Any]:
        """All of it in JSON's types; what is undefined is None."""
        return {
            **dict(self.tags),
            "estimator": self.estimator,
            "cv": self.cv,
            "n_samples": self.n_samples,
            "n_voxels": self.n_voxels,
            "seed": self.seed,
            "exchange": self.exchange,
            "classes": list(self.classes),
            "scores": {name: _number(value) for name, value in self.scores.items()},
            "folds": {name: _numbers(values) for name, values in self.folds.items()},
            "chance": dict(self.chance),
            "null": {name: _numbers(values) for name, values in self.null.items()},
            "p": {name: _number(value) for name, value in self.p.items()},
            "confusion": None if self.confusion is None else self.confusion.tolist(),
            "true": self.true.tolist(),
            "predicted": self.predicted.tolist(),
            "warnings": list(self.warnings),
        }

    def rows(self) -> list[dict[str, Any]]:
        """One flat record a score, for a table of many results."""
        return [
            {
                **dict(self.tags),
                "estimator": self.estimator,
                "cv": self.cv,
                "n_samples": self.n_samples,
                "n_voxels": self.n_voxels,
                "n_folds": len(values),
                "score": name,
                "value": mean_of_folds(values),
                "sd_folds": float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
                "chance": self.chance[name],
                "n_permutations": len(self.null.get(name, ())),
                "p": self.p.get(name, math.nan),
            }
            for name, values in self.folds.items()
        ]


def mean_of_folds(values: Floats) -> float:
    """The mean of the values that are defined; NaN for none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else math.nan


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _numbers(values: Floats) -> list[float | None]:
    return [_number(float(value)) for value in values]
