"""Correlations against scipy and scikit-learn; streaming against whole; the ceiling by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from sklearn.feature_selection import r_regression

from raypipe.errors import InputError
from raypipe.report.metrics import (
    PearsonSums,
    normalised_correlation,
    pearson_from_sums,
)


def pearson(x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """All rows as one batch."""
    return PearsonSums.of(x, y).correlation()


def pair(n: int = 37, v: int = 11, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, v)).astype(np.float32)
    return x, (0.6 * x + rng.standard_normal((n, v))).astype(np.float32)


def plain_sums(x: np.ndarray, y: np.ndarray) -> dict[str, object]:
    x, y = x.astype(np.float64), y.astype(np.float64)
    terms = {"x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}
    return {"n": len(x)} | {name: term.sum(0) for name, term in terms.items()}


def test_against_scipy_column_by_column() -> None:
    x, y = pair()
    want = [scipy.stats.pearsonr(x[:, v], y[:, v]).statistic for v in range(x.shape[1])]
    np.testing.assert_allclose(pearson(x, y), want, rtol=1e-6)


def test_against_sklearn() -> None:
    x, y = pair(n=200, v=5, seed=3)
    want = r_regression(x.astype(np.float64), y[:, 0].astype(np.float64))
    np.testing.assert_allclose(pearson(x, np.repeat(y[:, :1], 5, 1)), want, rtol=1e-10)


def test_plain_sums_agree() -> None:
    x, y = pair()
    np.testing.assert_allclose(pearson_from_sums(plain_sums(x, y)), pearson(x, y), rtol=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 2**31))
def test_any_batching_gives_the_whole(sizes: list[int], seed: int) -> None:
    n = sum(sizes) + 3
    x, y = pair(n=n, v=4, seed=seed)
    sums, at = PearsonSums.empty(4), 0
    for size in [*sizes, 3]:
        sums.add(x[at : at + size], y[at : at + size])
        at += size
    assert sums.n_rows == n
    np.testing.assert_allclose(sums.correlation(), pearson(x, y), rtol=1e-9, atol=1e-12)


def test_a_large_mean_does_not_cancel() -> None:
    x, y = pair(n=500)
    shifted = x.astype(np.float64) + 1e7
    sums = PearsonSums.empty(11)
    for lo in range(0, 500, 50):
        sums.add(shifted[lo : lo + 50], y[lo : lo + 50])
    np.testing.assert_allclose(sums.correlation(), pearson(x, y), atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3e8])
def test_constant_columns_are_nan(value: float) -> None:
    x, y = pair()
    x[:, 2], y[:, 5] = value, value
    for r in (pearson(x, y), pearson_from_sums(plain_sums(x, y))):
        assert np.flatnonzero(np.isnan(r)).tolist() == [2, 5]


def test_streamed_constant_column_is_nan() -> None:
    sums = PearsonSums.empty(1)
    for n in (3, 5, 7):
        sums.add(np.full((n, 1), 0.1), np.arange(n, dtype=float)[:, None])
    assert np.isnan(sums.correlation()[0])


def test_one_row_is_nan_and_perfect_is_one() -> None:
    assert np.isnan(pearson([[1.0]], [[2.0]])[0])
    x = np.arange(9.0)[:, None]
    assert 1.0 - 1e-12 < pearson(x, 3 * x - 7)[0] <= 1.0
    assert -1.0 <= pearson(x, -x)[0] < -1.0 + 1e-12


def test_tiny_values_still_correlate() -> None:
    x, y = pair()
    np.testing.assert_allclose(pearson(x * 1e-20, y * 1e-12), pearson(x, y), rtol=1e-5)


def test_nan_input_stays_in_its_column() -> None:
    x, y = pair()
    x[0, 3] = np.nan
    assert np.flatnonzero(np.isnan(pearson(x, y))).tolist() == [3]


@pytest.mark.parametrize("shapes", [((3, 2), (3, 1)), ((0, 2), (0, 2)), ((4,), (4,))])
def test_bad_shapes_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match="same"):
        pearson(np.zeros(shapes[0]), np.zeros(shapes[1]))


def test_ceiling_by_hand() -> None:
    got = normalised_correlation([0.6, -0.3, 0.5, np.nan, 0.9], [0.36, 0.25, 0.0, 0.5, 0.49])
    np.testing.assert_allclose(got.r_over_ceiling, [1.0, -0.6, np.nan, np.nan, 0.9 / 0.7])
    np.testing.assert_allclose(got.r2_over_ceiling, [1.0, 0.0, np.nan, np.nan, 0.81 / 0.49])


def test_ceiling_in_percent_is_refused() -> None:
    with pytest.raises(InputError, match="percent"):
        normalised_correlation([0.5, 0.5], [36.0, 12.0])
    with pytest.raises(InputError, match="one value a vertex"):
        normalised_correlation([0.5, 0.5], [0.3])
