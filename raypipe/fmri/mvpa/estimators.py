"""Which model decodes: the usual linear ones by name, any scikit-learn estimator by import path."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sklearn.base import is_classifier, is_regressor
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.svm import SVC, SVR

from raypipe.errors import ConfigError, InputError, UnknownName

CLASSIFIERS = ("svc", "logistic", "ridge_classifier", "lda")
REGRESSORS = ("ridge", "svr")


@dataclass(frozen=True, kw_only=True)
class EstimatorConfig:
    """The model that is fitted in each fold."""

    estimator: str = "svc"
    """svc, logistic, ridge_classifier, lda for classes; ridge, svr for targets; or package.Class."""
    c: float = 1.0
    """Inverse strength of regularisation of svc, svr and logistic; 1 is usual after z-scoring."""
    alpha: float = 1.0
    """Strength of regularisation of ridge and ridge_classifier."""
    params: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of an estimator given by import path."""

    def __post_init__(self) -> None:
        if not self.c > 0 or not self.alpha > 0:
            raise ConfigError(f"c {self.c} and alpha {self.alpha} must be above 0; 1 is usual")
        if self.params and self.is_named:
            raise ConfigError(
                f"params {dict(self.params)} are for an import path, {self.estimator} takes c or "
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
            return _imported(self.estimator, self.params)
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


def _imported(path: str, params: Mapping[str, Any]) -> Any:
    module, _, name = path.replace(":", ".").rpartition(".")
    if not module:
        raise UnknownName.of(
            "estimator", path, (*CLASSIFIERS, *REGRESSORS), "or give an import path, package.Class"
        )
    try:
        made = getattr(importlib.import_module(module), name)(**params)
    except (ImportError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"estimator {path} cannot be made: {error}; correct the path or params"
        ) from error
    if not (is_classifier(made) or is_regressor(made)):
        raise ConfigError(f"estimator {path} is neither classifier nor regressor; choose another")
    return made
