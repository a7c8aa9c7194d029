"""Decoding from end to end: scikit-learn's scores, the warning on mixed runs, honest p values, maps."""

from __future__ import annotations

import importlib
import json
import warnings
from typing import Any

import numpy as np
import pytest
from mvpa_kit import design_of, planted, planted_target
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.model_selection import LeaveOneGroupOut, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

from raypipe.errors import ConfigError, InputError, RaypipeWarning, UnknownName
from raypipe.fmri.mvpa import EstimatorConfig, Fold, MvpaConfig, decode, make_folds, weight_maps
from raypipe.fmri.mvpa.engines import Answers, SvcEngine
from raypipe.fmri.mvpa.folds import mixed_runs, neighbour_correlation


@pytest.mark.parametrize(
    ("model", "reference"),
    [
        (EstimatorConfig(), SVC(kernel="linear")),
        (EstimatorConfig(estimator="logistic", c=0.1), LogisticRegression(C=0.1, max_iter=1000)),
        (
            EstimatorConfig(estimator="lda"),
            LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
        ),
        (
            EstimatorConfig(estimator="sklearn.svm.LinearSVC", params=("random_state=0",)),
            LinearSVC(random_state=0),
        ),
    ],
)
def test_scores_are_those_of_cross_validate(model: EstimatorConfig, reference: Any) -> None:
    patterns, design = planted(2)
    result = decode(patterns, design, MvpaConfig(model=model))
    theirs = cross_validate(
        make_pipeline(StandardScaler(), reference),
        patterns,
        design.encoded(),
        groups=design.runs,
        cv=LeaveOneGroupOut(),
        scoring=("accuracy", "balanced_accuracy", "roc_auc"),
    )
    for name in ("accuracy", "balanced_accuracy", "roc_auc"):
        np.testing.assert_allclose(result.folds[name], theirs[f"test_{name}"])
    assert result.scores["accuracy"] > 0.7


def test_a_planted_pattern_is_found_and_noise_is_not() -> None:
    config = MvpaConfig(n_permutations=99, scores=("accuracy",))
    found = decode(*planted(3), config)
    assert found.p["accuracy"] == 1 / 100
    assert abs(float(found.null["accuracy"].mean()) - 1 / 3) < 0.03
    empty = decode(*planted(3, signal=0.0), config)
    assert empty.p["accuracy"] > 0.05
    assert abs(empty.scores["accuracy"] - 1 / 3) < 0.15
    target = decode(
        *planted_target(), MvpaConfig(model=EstimatorConfig(estimator="ridge"), n_permutations=99)
    )
    assert target.p["r"] == target.p["r2"] == 1 / 100
    assert target.confusion is None


def test_p_values_of_noise_are_uniform() -> None:
    config = MvpaConfig(
        model=EstimatorConfig(estimator="ridge_classifier"), n_permutations=39, scores=("accuracy",)
    )
    rng = np.random.default_rng(0)
    design = planted(2, n_runs=3, each=6)[1]
    p = [decode(rng.normal(size=(36, 20)), design, config).p["accuracy"] for _ in range(120)]
    assert np.mean(np.array(p) <= 0.1) < 0.2  # 0.1 expected; 0.2 has a chance of 0.0005
    assert 0.4 < np.mean(p) < 0.65


def _slow_noise(seed: int) -> tuple[np.ndarray, Any]:
    """Noise with nothing to decode: AR(1) of 0.9 over 4 runs, two classes in blocks of 10 volumes."""
    rng = np.random.default_rng(seed)
    patterns = np.zeros((4, 80, 40))
    patterns[:, 0] = rng.normal(size=(4, 40))
    for t in range(1, 80):
        patterns[:, t] = 0.9 * patterns[:, t - 1] + np.sqrt(1 - 0.81) * rng.normal(size=(4, 40))
    blocks = np.repeat(np.arange(32), 10)
    kinds = np.concatenate([rng.permutation(np.tile(["a", "b"], 4)) for _ in range(4)])
    return patterns.reshape(320, 40), design_of(kinds[blocks], np.repeat(np.arange(4), 80), blocks)


def test_shuffled_folds_on_autocorrelated_noise_warn_and_are_wrong() -> None:
    patterns, design = _slow_noise(1)
    with pytest.warns(RaypipeWarning, match=r"folds mix runs: 4 of 4 runs .* correlate by 0\.[89]"):
        shuffled = decode(patterns, design, MvpaConfig(cv="shuffled", scores=("accuracy",)))
    assert shuffled.scores["accuracy"] > 0.8  # of nothing
    assert "hold out whole runs" in shuffled.to_dict()["warnings"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        honest = decode(patterns, design, MvpaConfig(scores=("accuracy",)))
    assert abs(honest.scores["accuracy"] - 0.5) < 0.15
    assert honest.warnings == ()


def test_permuting_single_volumes_of_blocks_finds_what_is_not_there() -> None:
    low = {"block": 0, "sample": 0}
    for seed in range(12):
        patterns, design = _slow_noise(seed)
        for exchange in ("block", "sample"):
            config = MvpaConfig(
                model=EstimatorConfig(estimator="ridge_classifier"),
                n_permutations=39,
                scores=("accuracy",),
                exchange=exchange,  # type: ignore[arg-type]
            )
            low[exchange] += decode(patterns, design, config).p["accuracy"] <= 0.1
    assert low["block"] <= 4
    assert low["sample"] > low["block"]


def test_folds_hold_out_runs() -> None:
    _, design = planted(2, n_runs=6)
    for cv, n in (("leave_one_run_out", 6), ("runs", 3)):
        folds = make_folds(design, MvpaConfig(cv=cv, n_folds=3))  # type: ignore[arg-type]
        assert len(folds) == n
        assert mixed_runs(folds, design.runs).size == 0
        tested = np.sort(np.concatenate([fold.test for fold in folds]))
        np.testing.assert_array_equal(tested, np.arange(len(design)))
    shuffled = make_folds(design, MvpaConfig(cv="shuffled", n_folds=3))
    assert mixed_runs(shuffled, design.runs).tolist() == [0, 1, 2, 3, 4, 5]


def test_neighbour_correlation_is_a_plain_loops() -> None:
    rng = np.random.default_rng(0)
    patterns, runs = rng.normal(size=(20, 3)).cumsum(0), np.repeat([0, 1], 10)
    above = below = 0.0
    for run in (0, 1):
        own = patterns[runs == run]
        for v in range(3):
            x = own[:, v] - own[:, v].mean()
            above += sum(x[t] * x[t + 1] for t in range(9))
            below += sum(x[t] ** 2 for t in range(10))
    assert neighbour_correlation(patterns, runs) == pytest.approx(above / below)


def test_designs_that_cannot_be_cross_validated_are_refused() -> None:
    patterns, design = planted(2, n_runs=1)
    with pytest.raises(InputError, match=r"1 run\(s\), cv leave_one_run_out needs 2"):
        decode(patterns, design, MvpaConfig())
    patterns, design = planted(2, n_runs=2)
    alone = design_of(np.where(design.runs == 1, "dog", design.labels), design.runs)
    with pytest.raises(InputError, match="no training sample of class"):
        decode(patterns, alone, MvpaConfig())
    every = np.arange(len(design))
    with pytest.raises(InputError, match="tests on samples it trains on"):
        decode(patterns, design, MvpaConfig(), folds=[Fold(train=every, test=every)])


def test_models_and_scores_must_fit_the_labels() -> None:
    patterns, design = planted(2)
    with pytest.raises(InputError, match="ridge does not predict classes"):
        decode(patterns, design, MvpaConfig(model=EstimatorConfig(estimator="ridge")))
    with pytest.raises(ConfigError, match="score r2 does not fit"):
        decode(patterns, design, MvpaConfig(scores=("r2",)))
    with pytest.raises(InputError, match="svc does not predict numbers"):
        decode(*planted_target(), MvpaConfig())
    with pytest.raises(InputError, match="give one row a sample"):
        decode(patterns[:-1], design, MvpaConfig())
    with pytest.raises(UnknownName, match="unknown estimator 'scv'; nearest: svr, svc; or give"):
        EstimatorConfig(estimator="scv")
    with pytest.raises(ConfigError, match="cannot be made"):
        EstimatorConfig(estimator="sklearn.svm.NoSuch")
    with pytest.raises(ConfigError, match="neither classifier nor regressor"):
        EstimatorConfig(estimator="sklearn.preprocessing.StandardScaler")
    with pytest.raises(UnknownName, match="unknown score 'acuracy'; nearest: accuracy"):
        MvpaConfig(scores=("acuracy",))


def test_voxels_that_are_not_finite_are_left_out() -> None:
    patterns, design = planted(2)
    holes = np.hstack((patterns, np.full((len(patterns), 2), np.nan)))
    ours, expected = (decode(p, design, MvpaConfig()) for p in (holes, patterns))
    assert ours.n_voxels == patterns.shape[1]
    np.testing.assert_array_equal(ours.predicted, expected.predicted)
    with pytest.raises(InputError, match="none of 2 voxels is finite"):
        decode(holes[:, -2:], design, MvpaConfig())


def test_a_result_is_written_as_json_and_rows() -> None:
    patterns, design = planted(3)
    config = MvpaConfig(n_permutations=5, seed=4)
    result = decode(patterns, design, config, tags={"subject": "01", "roi": "FFA"})
    told = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert told["classes"] == ["cat", "face", "house"]
    assert len(told["null"]["accuracy"]) == 5
    assert np.array(told["confusion"]).sum() == len(design)
    assert np.trace(np.array(told["confusion"])) == round(told["scores"]["accuracy"] * len(design))
    rows = result.rows()
    assert [row["score"] for row in rows] == ["accuracy", "balanced_accuracy", "roc_auc"]
    assert rows[0]["subject"] == "01"
    assert rows[0]["value"] == pytest.approx(told["scores"]["accuracy"])
    again = decode(patterns, design, config)
    np.testing.assert_array_equal(again.null["accuracy"], result.null["accuracy"])


@pytest.mark.parametrize("name", ["svc", "logistic", "ridge_classifier"])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_weights_point_to_the_class_they_are_named_after(name: str, n_classes: int) -> None:
    patterns, design = planted(n_classes, signal=1.0)
    maps = weight_maps(patterns, design, MvpaConfig(model=EstimatorConfig(estimator=name)))
    assert maps.weights.shape == maps.patterns.shape == (len(maps.names), patterns.shape[1])
    scaled = (patterns - patterns.mean(0)) / patterns.std(0)
    for called, weights in zip(maps.names, maps.weights, strict=True):
        up, _, down = called.partition(" over ")
        mean_up = (scaled @ weights)[design.labels == up].mean()
        against = design.labels == down if down else design.labels != up
        assert mean_up > (scaled @ weights)[against].mean()
    if name == "svc" and n_classes == 3:
        assert maps.names == ("cat over face", "cat over house", "face over house")


class OfTwoVoxels(RidgeClassifier):  # type: ignore[misc]
    """Chooses voxels, as some models do: its weights belong to no map."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> OfTwoVoxels:  # noqa: N803
        super().fit(X[:, :2], y, sample_weight)
        return self

    def decision_function(self, X: Any) -> Any:  # noqa: N803
        return super().decision_function(X[:, :2])


@pytest.mark.parametrize(
    ("estimator", "told"),
    [
        ("sklearn.neighbors.KNeighborsClassifier", "has no weights; choose a linear one"),
        (f"{__name__}.OfTwoVoxels", r"has 2 weights for \d+ voxels; choose one that keeps all"),
    ],
)
def test_a_model_without_weights_is_told_before_the_permutations(
    monkeypatch: pytest.MonkeyPatch, estimator: str, told: str
) -> None:
    def too_late(*_: Any) -> None:
        pytest.fail("permutations began")

    monkeypatch.setattr(importlib.import_module("raypipe.fmri.mvpa.decode"), "_null", too_late)
    config = MvpaConfig(model=EstimatorConfig(estimator=estimator), n_permutations=10)
    with pytest.raises(InputError, match=told):
        decode(*planted(2), config, weights=True)


def test_weights_come_with_the_scores_on_request() -> None:
    patterns, design = planted(3)
    patterns[2, 7] = np.nan
    asked = decode(patterns, design, MvpaConfig(), weights=True).weights
    assert asked is not None
    expected = weight_maps(patterns, design, MvpaConfig())
    np.testing.assert_array_equal(asked.weights, expected.weights)
    np.testing.assert_array_equal(asked.patterns, expected.patterns)
    assert np.isnan(asked.weights).any(0).nonzero()[0].tolist() == [7]
    assert decode(patterns, design, MvpaConfig()).weights is None


def test_haufe_patterns_are_those_of_the_formula() -> None:
    patterns, design = planted(3)
    patterns[:, 4] = np.nan
    maps = weight_maps(patterns, design, MvpaConfig(scale="centre"))
    left = np.delete(patterns, 4, axis=1)
    weights = np.delete(maps.weights, 4, axis=1)
    cov = np.cov(left.T)
    expected = np.linalg.pinv(weights @ cov @ weights.T) @ (weights @ cov)
    np.testing.assert_allclose(np.delete(maps.patterns, 4, axis=1), expected, rtol=1e-6, atol=1e-9)
    assert np.isnan(maps.weights[:, 4]).all()


def test_a_batch_of_permutations_counts_pairs_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 classes have 66 decisions each, which a fold holds at once for all permutations of a batch."""
    budget, seen = 1 << 18, []
    real = SvcEngine.answer

    def answer(self: SvcEngine, labels: np.ndarray) -> Answers:
        seen.append(len(labels))
        return real(self, labels)

    labels = np.tile([f"c{n:02}" for n in range(12)], 3)
    design = design_of(labels, np.repeat(np.arange(3), 12))
    patterns = np.random.default_rng(0).normal(size=(36, 8))
    config = MvpaConfig(n_permutations=40, scores=("accuracy",), exchange="sample")
    whole = decode(patterns, design, config)
    module = importlib.import_module("raypipe.fmri.mvpa.decode")
    monkeypatch.setattr(module, "_BATCH_BYTES", budget)
    monkeypatch.setattr(SvcEngine, "answer", answer)
    parts = decode(patterns, design, config)
    assert max(seen) > 1 and max(seen) * 8 * 36 * 66 <= budget
    np.testing.assert_array_equal(parts.null["accuracy"], whole.null["accuracy"])
