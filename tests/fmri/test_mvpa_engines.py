"""Fast fits of many label vectors against scikit-learn refitted label by label; scores against it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mvpa_kit import design_of, planted, planted_target
from scipy.stats import pearsonr
from sklearn import metrics
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR

from raypipe.errors import InputError
from raypipe.fmri.mvpa import EstimatorConfig, Fold, MvpaConfig, make_folds, scores
from raypipe.fmri.mvpa.engines import RidgeEngine, SvcEngine, make_engine
from raypipe.fmri.mvpa.permute import p_value, permutations
from raypipe.fmri.mvpa.smo import TOLERANCE

REFERENCES: dict[str, Any] = {
    "svc": lambda: SVC(kernel="linear", C=0.5),
    "svr": lambda: SVR(kernel="linear", C=0.5),
    "ridge": lambda: Ridge(alpha=3.0),
    "ridge_classifier": lambda: RidgeClassifier(alpha=3.0),
}


def _refitted(
    name: str, patterns: np.ndarray, fold: Fold, labels: np.ndarray, scale: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """scikit-learn's pipeline, fitted anew: predictions and decision values of the test samples."""
    scaler = [] if scale == "none" else [StandardScaler(with_std=scale == "zscore")]
    model = make_pipeline(*scaler, REFERENCES[name]())
    model.fit(patterns[fold.train], labels[fold.train])
    test = patterns[fold.test]
    is_class = name in ("svc", "ridge_classifier")
    return model.predict(test), model.decision_function(test) if is_class else None


@pytest.mark.parametrize("scale", ["zscore", "centre", "none"])
@pytest.mark.parametrize("n_voxels", [8, 150])  # fewer and more than samples
@pytest.mark.parametrize("n_classes", [2, 3, 4])
@pytest.mark.parametrize("name", ["svc", "ridge_classifier"])
def test_permuted_classes_are_predicted_as_refitting_does(
    name: str, n_classes: int, n_voxels: int, scale: str
) -> None:
    patterns, design = planted(n_classes, n_voxels=n_voxels, signal=0.3)
    patterns -= 100 if scale == "none" else 0  # a far origin is refitting's own rounding error
    labels = design.encoded()
    drawn = labels[permutations(design, 6, exchange="sample", seed=3)]
    model = EstimatorConfig(estimator=name, c=0.5, alpha=3.0)
    for fold in make_folds(design, MvpaConfig()):
        engine = make_engine(patterns, fold, model, scale)
        assert isinstance(engine, SvcEngine if name == "svc" else RidgeEngine)
        answers = engine.answer(drawn)
        assert answers.decision is not None
        for i, one in enumerate(drawn):
            predicted, decision = _refitted(name, patterns, fold, one, scale)
            # far below libsvm's tolerance of 1e-3: the same way, not only a like end
            np.testing.assert_allclose(answers.decision[i], decision, atol=1e-7)
            np.testing.assert_array_equal(answers.predicted[i], predicted)


@pytest.mark.parametrize("n_voxels", [8, 150])
@pytest.mark.parametrize("name", ["svr", "ridge"])
def test_permuted_targets_are_predicted_as_refitting_does(name: str, n_voxels: int) -> None:
    patterns, design = planted_target(n_voxels=n_voxels)
    drawn = design.encoded()[permutations(design, 6, exchange="sample", seed=3)]
    model = EstimatorConfig(estimator=name, c=0.5, alpha=3.0)
    for fold in make_folds(design, MvpaConfig()):
        answers = make_engine(patterns, fold, model, "zscore").answer(drawn)
        for i, one in enumerate(drawn):
            predicted, _ = _refitted(name, patterns, fold, one, "zscore")
            atol = 1e-8 if name == "ridge" else 5e-3
            np.testing.assert_allclose(answers.predicted[i], predicted, atol=atol)


@given(seed=st.integers(0, 500), n_voxels=st.integers(1, 60), c=st.floats(1e-3, 100))
def test_any_two_classes_are_separated_as_libsvm_does(seed: int, n_voxels: int, c: float) -> None:
    rng = np.random.default_rng(seed)
    patterns, labels = rng.normal(size=(50, n_voxels)), rng.permutation(np.arange(50) % 2)
    fold = Fold(train=np.arange(40), test=np.arange(40, 50))
    engine = make_engine(patterns, fold, EstimatorConfig(c=c), "none")
    gram, test = patterns[:40] @ patterns[:40].T, patterns[40:] @ patterns[:40].T
    theirs = SVC(kernel="precomputed", C=c).fit(gram, labels[:40])
    decision = theirs.decision_function(test)
    weight = np.abs(theirs.dual_coef_[0]) / c
    # With no weight between the bounds any offset of an interval is as good; libsvm takes one weight of
    # 1e-16 for such (seed 419, 1 voxel, c 0.5) and an edge of the interval, we its middle.
    assume(((weight > 1e-9) & (weight < 1 - 1e-9)).any())
    ours = engine.answer(labels[None])
    assert ours.decision is not None
    # Where two steps are equally good, rounding chooses, and both end within their tolerance.
    atol = 2 * TOLERANCE * max(1.0, float(np.abs(decision).max()))
    np.testing.assert_allclose(ours.decision[0], decision, atol=atol)
    clear = np.abs(decision) > atol
    np.testing.assert_array_equal(ours.predicted[0][clear], theirs.predict(test)[clear])


@pytest.mark.parametrize("seed", range(8))
def test_separable_patterns_end_where_libsvm_does(seed: int) -> None:
    """As patterns of hundreds of voxels are: one optimum, and no two steps alike."""
    rng = np.random.default_rng(seed)
    patterns, labels = rng.normal(size=(50, 400)), rng.permutation(np.arange(50) % 2)
    engine = make_engine(
        patterns, Fold(train=np.arange(40), test=np.arange(40, 50)), EstimatorConfig(), "none"
    )
    theirs = SVC(kernel="linear").fit(patterns[:40], labels[:40])
    ours = engine.answer(labels[None])
    assert ours.decision is not None
    np.testing.assert_allclose(ours.decision[0], theirs.decision_function(patterns[40:]), atol=1e-7)
    np.testing.assert_array_equal(ours.predicted[0], theirs.predict(patterns[40:]))


def test_a_constant_voxel_does_not_matter() -> None:
    patterns, design = planted(2)
    fold = make_folds(design, MvpaConfig())[0]
    labels = design.encoded()[None]
    model = EstimatorConfig()
    with_one = np.hstack((patterns, np.full((len(patterns), 1), 0.1)))
    ours = make_engine(with_one, fold, model, "zscore").answer(labels).decision
    expected = make_engine(patterns, fold, model, "zscore").answer(labels).decision
    assert ours is not None
    np.testing.assert_allclose(ours, expected, atol=5e-3)


@given(
    n_runs=st.integers(1, 5),
    per_run=st.integers(1, 6),
    size=st.integers(1, 4),
    exchange=st.sampled_from(["block", "sample"]),
    seed=st.integers(0, 99),
)
def test_labels_never_leave_their_run(
    n_runs: int, per_run: int, size: int, exchange: str, seed: int
) -> None:
    runs = np.repeat(np.arange(n_runs), per_run * size)
    blocks = np.repeat(np.arange(n_runs * per_run), size)
    labels = np.random.default_rng(seed).choice(["a", "b", "c"], n_runs * per_run)[blocks]
    design = design_of(labels, runs, blocks)
    drawn = permutations(design, 8, exchange=exchange, seed=seed)
    assert (runs[drawn] == runs).all()
    for one in drawn:
        for run in range(n_runs):
            own = runs == run
            assert sorted(labels[one][own]) == sorted(labels[own])
        if exchange == "block":  # a block keeps one label
            assert all(len(set(labels[one][blocks == b])) == 1 for b in np.unique(blocks))


def test_permutations_depend_on_their_number_alone() -> None:
    _, design = planted(3)
    whole = permutations(design, 10, exchange="sample", seed=1)
    parts = [
        permutations(design, n, exchange="sample", seed=1, first=at) for at, n in ((0, 3), (3, 7))
    ]
    np.testing.assert_array_equal(whole, np.vstack(parts))
    assert len(np.unique(whole, axis=0)) == 10
    assert (whole != permutations(design, 10, exchange="sample", seed=2)).any()


def test_blocks_that_make_no_sense_are_refused() -> None:
    runs = np.repeat([0, 1], 4)
    with pytest.raises(InputError, match="lies in two runs"):
        permutations(
            design_of(np.repeat("a", 8), runs, np.zeros(8, int)), 1, exchange="block", seed=0
        )
    mixed = design_of(np.tile(["a", "b"], 4), runs, np.repeat([0, 1], 4))
    with pytest.raises(InputError, match="holds two labels"):
        permutations(mixed, 1, exchange="block", seed=0)


def test_p_counts_the_score_itself_and_undefined_permutations() -> None:
    assert p_value(0.9, [0.1, 0.2, 0.9, 0.95]) == 3 / 5
    assert p_value(0.99, np.zeros(999)) == 1 / 1000
    assert p_value(0.5, [np.nan, 0.1]) == 2 / 3
    assert np.isnan(p_value(np.nan, [0.1]))


@settings(max_examples=25)
@given(seed=st.integers(0, 500), k=st.integers(2, 4), n=st.integers(6, 20))
def test_scores_of_classes_are_scikit_learns(seed: int, k: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    true = np.vstack([rng.permutation(np.arange(n) % k) for _ in range(3)])
    decision = np.round(rng.normal(size=(3, n, k)), 1)  # with ties
    predicted = decision.argmax(axis=2)
    two = decision[:, :, 0]
    for i in range(3):
        share = metrics.accuracy_score(true[i], predicted[i])
        assert scores.accuracy(true, predicted)[i] == pytest.approx(share)
        recall = metrics.recall_score(
            true[i], predicted[i], average="macro", labels=np.unique(true[i]), zero_division=0
        )
        assert scores.balanced_accuracy(true, predicted)[i] == pytest.approx(recall)
        areas = [metrics.roc_auc_score(true[i] == c, decision[i, :, c]) for c in range(k)]
        assert scores.roc_auc(true, decision)[i] == pytest.approx(np.mean(areas))
        area = metrics.roc_auc_score(true[i] == 1, two[i])
        assert scores.roc_auc(true, two)[i] == pytest.approx(area)


@settings(max_examples=25)
@given(seed=st.integers(0, 500), n=st.integers(3, 20))
def test_scores_of_targets_are_scipys_and_scikit_learns(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    true, predicted = rng.normal(size=(2, 3, n))
    for i in range(3):
        assert scores.pearson(true, predicted)[i] == pytest.approx(
            pearsonr(true[i], predicted[i])[0]
        )
        r2 = metrics.r2_score(true[i], predicted[i])
        assert scores.r_squared(true, predicted)[i] == pytest.approx(r2)


def test_undefined_scores_are_nan() -> None:
    one_class, flat = np.ones((1, 4), int), np.full((1, 4), 2.0)
    assert np.isnan(scores.roc_auc(one_class, np.array([[1.0, 2, 3, 4]])))
    assert np.isnan(scores.pearson(np.array([[1.0, 2, 3, 4]]), flat))
    assert np.isnan(scores.r_squared(flat, flat))
    assert np.isnan(scores.rate("roc_auc", one_class, one_class, None)).all()


def test_chance_is_what_guessing_gives() -> None:
    assert scores.chance("accuracy", np.array([30, 10])) == 0.75
    assert scores.chance("balanced_accuracy", np.array([30, 10])) == 0.5
    assert scores.chance("roc_auc", np.array([3, 3, 3])) == 0.5
    assert scores.chance("r", np.array([9])) == 0.0
