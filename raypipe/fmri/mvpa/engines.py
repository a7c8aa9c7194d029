"""Fit one fold for many label vectors: what does not depend on the labels is done once.

A support vector machine sees patterns only through their inner products, so one Gram matrix a fold
serves all permutations; ridge is linear in the labels, so one matrix maps any training labels to their
test predictions, and a thousand permutations are one product. Everything else is refitted. All give the
predictions that scikit-learn gives when it is refitted label by label.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import combinations
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from sklearn.base import clone
from sklearn.svm import SVR

from raypipe.errors import RaypipeWarning
from raypipe.fmri.mvpa.estimators import EstimatorConfig
from raypipe.fmri.mvpa.folds import Fold

Floats = NDArray[np.float64]
Labels = NDArray[np.generic]

_SCALED = 10 * np.finfo(np.float64).eps  # scikit-learn's: a smaller deviation is a constant voxel


class Answers(NamedTuple):
    """predicted : (p, n_test); decision : (p, n_test), (p, n_test, k) for k > 2 classes, or None."""

    predicted: Labels
    decision: Floats | None


class Engine(Protocol):
    """A fold, ready to be fitted."""

    def answer(self, labels: Labels) -> Answers:
        """labels : (p, n) of all samples, int64 classes or float64 targets -> answers on the test."""
        ...


def make_engine(patterns: Floats, fold: Fold, model: EstimatorConfig, scale: str) -> Engine:
    """The fastest exact engine for ``model``. patterns : (n, n_voxels), not scaled."""
    train, test = scaled(patterns, fold, scale)
    named: dict[str, Callable[..., Engine]] = {
        "svc": SvcEngine,
        "svr": SvrEngine,
        "ridge": RidgeEngine,
        "ridge_classifier": RidgeEngine,
    }
    if model.estimator in named:
        return named[model.estimator](train, test, fold, model)
    return RefitEngine(train, test, fold, model.build())


def scaled(patterns: Floats, fold: Fold, scale: str) -> tuple[Floats, Floats]:
    """Training and test patterns, each voxel by the training samples' mean and deviation."""
    train, test = patterns[fold.train], patterns[fold.test]
    if scale == "none":
        return train, test
    mean = train.mean(axis=0)
    deviation = _deviation(train, mean) if scale == "zscore" else None
    for own in (train, test):  # copies already: another of each is not planned for
        own -= mean
        if deviation is not None:
            own /= deviation
    return train, test


def _deviation(train: Floats, mean: Floats) -> Floats:
    """(n_voxels,), 1 for a voxel that is constant."""
    deviation: Floats = train.std(axis=0)
    deviation[deviation <= _SCALED * np.maximum(np.abs(mean), 1e-300)] = 1.0
    return deviation


class RefitEngine:
    """Fits a copy of the estimator for each label vector."""

    def __init__(self, train: Floats, test: Floats, fold: Fold, estimator: Any) -> None:
        """train : (n_train, n_voxels), or (n_train, n_train) of a Gram matrix; test alike."""
        self._train, self._test, self._fold, self._estimator = train, test, fold, estimator

    def answer(self, labels: Labels) -> Answers:
        predicted, decisions = [], []
        for one in labels:
            model = clone(self._estimator).fit(self._train, one[self._fold.train])
            predicted.append(model.predict(self._test))
            decisions.append(_decision(model, self._test, one))
            del model  # it may hold voxels x voxels, and the next one is not planned for beside it
        whole = None if any(d is None for d in decisions) else np.array(decisions, np.float64)
        return Answers(np.array(predicted), whole)


class SvcEngine:
    """A support vector classifier on a Gram matrix that was computed once."""

    def __init__(self, train: Floats, test: Floats, fold: Fold, model: EstimatorConfig) -> None:
        self._hold(train @ train.T, test @ train.T, fold, model)

    @classmethod
    def of_gram(cls, gram: Floats, test: Floats, fold: Fold, model: EstimatorConfig) -> SvcEngine:
        """gram : (n_train, n_train); test : (n_test, n_train) inner products with the training."""
        made = cls.__new__(cls)
        made._hold(gram, test, fold, model)
        return made

    def _hold(self, gram: Floats, test: Floats, fold: Fold, model: EstimatorConfig) -> None:
        self._gram = np.ascontiguousarray(gram)
        self._test = np.ascontiguousarray(test)
        self._fold, self._c = fold, model.c

    def answer(self, labels: Labels) -> Answers:
        from raypipe.fmri.mvpa import smo  # compiles

        own = np.ascontiguousarray(labels[:, self._fold.train], np.int64)
        k = int(labels.max()) + 1
        pairs = np.empty((len(own), len(self._test), k * (k - 1) // 2))
        failed = smo.decide(self._gram, self._test, own, k, self._c, smo.TOLERANCE, pairs)
        if failed:
            warnings.warn(
                f"{failed} support vector fits did not converge; scale voxels or give a smaller c",
                RaypipeWarning,
                stacklevel=3,
            )
        if k == 2:
            decision = -pairs[:, :, 0]
            return Answers((decision >= 0).astype(np.int64), decision)
        return _vote(pairs, k)


def _vote(pairs: Floats, k: int) -> Answers:
    """pairs : (p, n_test, n_pairs) -> the class with most votes; decisions (p, n_test, k).

    Votes, and the summed decisions squeezed to less than half a vote, as scikit-learn's SVC gives them.
    """
    votes = np.zeros((*pairs.shape[:2], k))
    sums = np.zeros_like(votes)
    for pair, (a, b) in enumerate(combinations(range(k), 2)):
        first = pairs[:, :, pair] > 0
        votes[:, :, a] += first
        votes[:, :, b] += ~first
        sums[:, :, a] += pairs[:, :, pair]
        sums[:, :, b] -= pairs[:, :, pair]
    return Answers(votes.argmax(axis=-1), votes + sums / (3 * (np.abs(sums) + 1)))


class SvrEngine(RefitEngine):
    """Support vector regression on a Gram matrix that was computed once."""

    def __init__(self, train: Floats, test: Floats, fold: Fold, model: EstimatorConfig) -> None:
        super().__init__(train @ train.T, test @ train.T, fold, _svr(model))

    @classmethod
    def of_gram(cls, gram: Floats, test: Floats, fold: Fold, model: EstimatorConfig) -> RefitEngine:
        """gram : (n_train, n_train); test : (n_test, n_train) inner products with the training."""
        return RefitEngine(gram, test, fold, _svr(model))


def _svr(model: EstimatorConfig) -> SVR:
    return SVR(kernel="precomputed", C=model.c)


class RidgeEngine:
    """Ridge, and ridge on -1/1 labels of each class: one matrix from training labels to predictions."""

    def __init__(self, train: Floats, test: Floats, fold: Fold, model: EstimatorConfig) -> None:
        mean = train.mean(axis=0)
        train, test = train - mean, test - mean
        self._hold(_hat(train, test, model.alpha), fold, model)

    @classmethod
    def of_gram(cls, gram: Floats, test: Floats, fold: Fold, model: EstimatorConfig) -> RidgeEngine:
        """gram : (n_train, n_train); test : (n_test, n_train) inner products with the training."""
        column = gram.mean(axis=0)
        centred = gram - column - column[:, np.newaxis] + column.mean()
        own = test - column - test.mean(axis=1, keepdims=True) + column.mean()
        made = cls.__new__(cls)
        made._hold(_hat_of_gram(centred, own, model.alpha), fold, model)
        return made

    def _hold(self, hat: Floats, fold: Fold, model: EstimatorConfig) -> None:
        self._hat = hat
        self._fold, self._classes = fold, model.estimator == "ridge_classifier"

    def answer(self, labels: Labels) -> Answers:
        own = labels[:, self._fold.train]
        if not self._classes:
            return Answers(self._predict(own.astype(np.float64)), None)
        n_classes = int(labels.max()) + 1
        if n_classes == 2:
            decision = self._predict(np.where(own == 1, 1.0, -1.0))
            return Answers((decision > 0).astype(np.int64), decision)
        one_each = [self._predict(np.where(own == k, 1.0, -1.0)) for k in range(n_classes)]
        decision = np.stack(one_each, axis=-1)
        return Answers(decision.argmax(axis=-1), decision)

    def _predict(self, targets: Floats) -> Floats:
        """targets : (p, n_train) -> (p, n_test)."""
        mean = targets.mean(axis=1, keepdims=True)
        predicted: Floats = (targets - mean) @ self._hat.T + mean
        return predicted


def _hat(train: Floats, test: Floats, alpha: float) -> Floats:
    """(n_test, n_train): centred training targets -> test predictions; the smaller system is solved."""
    n, voxels = train.shape
    if voxels <= n:
        gram = train.T @ train
        gram[np.diag_indices(voxels)] += alpha
        solved: Floats = test @ linalg.solve(gram, train.T, assume_a="pos")
        return solved
    return _hat_of_gram(train @ train.T, test @ train.T, alpha)


def _hat_of_gram(gram: Floats, test: Floats, alpha: float) -> Floats:
    """gram : (n_train, n_train), changed; test : (n_test, n_train); of centred patterns."""
    gram[np.diag_indices(len(gram))] += alpha
    hat: Floats = linalg.solve(gram, test.T, assume_a="pos").T
    return hat


def _decision(model: Any, test: Floats, labels: Labels) -> Floats | None:
    """Decision values, or probabilities, of a fitted classifier; None where it has neither."""
    if labels.dtype.kind == "f":
        return None
    give: Callable[[Floats], Floats] | None = getattr(model, "decision_function", None)
    if give is not None:
        return give(test)
    if not hasattr(model, "predict_proba"):
        return None
    probability: Floats = model.predict_proba(test)
    return probability[:, 1] if probability.shape[1] == 2 else probability
