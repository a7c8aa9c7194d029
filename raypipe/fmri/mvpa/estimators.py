"""Which model decodes: the usual linear ones by name, any scikit-learn estimator by import path."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sklearn.base import is_classifier, is_regressor
from sklearn.discriminant_analysis import (
    LinearDiscriminantAnalysis,
    QuadraticDiscriminantAnalysis,
)
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.svm import SVC, SVR, NuSVC

from raypipe.errors import ConfigError, InputError, UnknownName

CLASSIFIERS = ("svc", "logistic", "ridge_classifier", "lda")
REGRESSORS = ("ridge", "svr")
# Measured: 40 float64 rows a map, of the ten steps that L-BFGS remembers and SciPy's copies of them.
_LBFGS_ROWS = 44


@dataclass(frozen=True, kw_only=True)
class EstimatorConfig:
    """The model that is fitted in each fold."""

    estimator: str = "svc"
    """svc, logistic, ridge_classifier, lda for classes; ridge, svr for targets; or package.Class."""
    c: float = 1.0
    """Inverse strength of regularisation of svc, svr and logistic; 1 is usual after z-scoring."""
    alpha: float = 1.0
    """Strength of regularisation of ridge and ridge_classifier."""
    params: tuple[str, ...] = ()
    """Arguments of an estimator given by import path: NAME=VALUE, e.g. C=0.1 max_iter=5000."""

    def __post_init__(self) -> None:
        if not 0 < self.c < math.inf or not 0 < self.alpha < math.inf:
            raise ConfigError(
                f"c {self.c} and alpha {self.alpha} must be above 0 and finite; 1 is usual"
            )
        if self.params and self.is_named:
            raise ConfigError(
                f"params {' '.join(self.params)} are for an import path, {self.estimator} takes c or "
                "alpha; give e.g. estimator sklearn.svm.LinearSVC"
            )
        self.build()

    @property
    def is_named(self) -> bool:
        """Whether the estimator is one of those known by name."""
        return self.estimator in (*CLASSIFIERS, *REGRESSORS)

    @property
    def is_classifier(self) -> bool:
        """Whether it predicts classes; otherwise numbers."""
        return bool(is_classifier(self.build()))

    def build(self) -> Any:
        """A fresh scikit-learn estimator; raises UnknownName or ConfigError."""
        if not self.is_named:
            return _imported(self.estimator, dict(map(_argument, self.params)))
        made: dict[str, Any] = {
            "svc": lambda: SVC(kernel="linear", C=self.c),
            "logistic": lambda: LogisticRegression(C=self.c, max_iter=1000),
            "ridge_classifier": lambda: RidgeClassifier(alpha=self.alpha),
            # voxels outnumber samples: the covariance must be shrunk to be invertible
            "lda": lambda: LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
            "ridge": lambda: Ridge(alpha=self.alpha),
            "svr": lambda: SVR(kernel="linear", C=self.c),
        }
        return made[self.estimator]()


def check_fits(config: EstimatorConfig, classes: bool) -> None:
    """Raises InputError when a classifier is to predict numbers, or a regressor classes."""
    if config.is_classifier != classes:
        has = "classes" if classes else "numbers"
        known = CLASSIFIERS if classes else REGRESSORS
        raise InputError(
            f"estimator {config.estimator} does not predict {has}, which the design has; "
            f"choose one of {', '.join(known)}"
        )


def decides_by_pairs(model: Any) -> bool:
    """Whether each of its weights is of a pair of classes, not of a class."""
    return isinstance(model, SVC | NuSVC)


def maps_at_most(config: EstimatorConfig, n_classes: int) -> int:
    """Rows of its weights: one for two classes or a number, else one a class or a pair of classes. Of
    somebody's own model it is not known: the most that it may be.
    """
    if n_classes <= 2:
        return 1
    model, pairs = config.build(), n_classes * (n_classes - 1) // 2
    if decides_by_pairs(model):
        return pairs
    return n_classes if type(model).__module__.startswith("sklearn.") else max(n_classes, pairs)


def solver_rows(config: EstimatorConfig, n_classes: int, n_samples: int) -> int:
    """Rows of float64, as long as a pattern, that a fit takes beside the patterns."""
    model = config.build()
    if isinstance(model, LinearDiscriminantAnalysis) and model.solver == "svd":
        return 3 * n_samples  # measured: patterns by class, scaled, and as LAPACK wants them
    is_lbfgs = isinstance(model, LogisticRegression) and model.solver == "lbfgs"
    return _LBFGS_ROWS * maps_at_most(config, n_classes) if is_lbfgs else 0


def solver_squares(config: EstimatorConfig, n_classes: int) -> int:
    """Matrices of voxels x voxels, float64, that a fit holds at once. Counted in scikit-learn's source, and
    measured as the process's peak (LAPACK's copies are no Python object's): covariances with their copies
    while they are shrunk, scaled, or decomposed; a Hessian, with two of SciPy's (1.17) while it is solved.
    """
    model = config.build()
    if isinstance(model, LinearDiscriminantAnalysis):
        # The sum over classes, a class's own, and two while that is scaled back; three while another is
        # shrunk by a stated part. Of eigen two sums, their difference, and LAPACK's copies and workspace.
        shrunk = {"auto": 4, None: 3}.get(model.shrinkage, 5)
        return {"lsqr": shrunk, "eigen": 7}.get(model.solver, 3 if model.store_covariance else 0)
    if isinstance(model, QuadraticDiscriminantAnalysis):
        # Covariances and rotations of all classes; one more while it is sorted, or two while it is shrunk.
        own = 1 if model.shrinkage in (None, "auto") else 2
        return 2 * n_classes + own if model.solver == "eigen" else 0
    if isinstance(model, LogisticRegression) and model.solver == "newton-cholesky":
        return 3 * maps_at_most(config, n_classes) ** 2
    return 0


def _imported(path: str, params: Mapping[str, Any]) -> Any:
    module, _, name = path.replace(":", ".").rpartition(".")
    if not module:
        raise UnknownName.of(
            "estimator", path, (*CLASSIFIERS, *REGRESSORS), "or give an import path, package.Class"
        )
    try:
        made = getattr(importlib.import_module(module), name)(**params)
        known = hasattr(made, "fit") and (is_classifier(made) or is_regressor(made))
    except Exception as error:  # its module is somebody's own: it may raise anything
        told = " ".join(str(error).split())
        raise ConfigError(
            f"estimator {path} cannot be made: {type(error).__name__}: {told}; correct the path or params"
        ) from error
    if not known:
        raise ConfigError(f"estimator {path} is neither classifier nor regressor; choose another")
    return made


def _argument(text: str) -> tuple[str, Any]:
    """``C=0.1`` -> ("C", 0.1). Numbers, lists, true, false and null as in JSON; else it is text."""
    name, mark, value = text.partition("=")
    if not mark or not name.isidentifier():
        raise ConfigError(f"params {text!r} is not NAME=VALUE; write e.g. C=0.1")
    words = {"True": True, "False": False, "None": None}
    if value in words:
        return name, words[value]
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
