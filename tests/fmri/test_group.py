"""Group tests against scipy and plain loops over all sign flips."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from raypipe.errors import InputError
from raypipe.fmri.cohort import at_best, group_rows, lines
from raypipe.fmri.group import (
    SignFlips,
    false_discovery_rate,
    least_p,
    one_sample_t,
    sign_flip,
    sign_patterns,
)


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
def test_t_is_scipys(alternative: str) -> None:
    values = np.random.default_rng(0).normal(0.6, 0.1, size=(9, 50))
    ours = one_sample_t(values, chance=0.58, alternative=alternative)  # type: ignore[arg-type]
    theirs = stats.ttest_1samp(values, 0.58, alternative=alternative)
    np.testing.assert_allclose(ours.t, theirs.statistic)
    np.testing.assert_allclose(ours.p, theirs.pvalue)
    np.testing.assert_allclose(ours.mean, values.mean(0))
    assert ours.n_subjects == 9
    one = one_sample_t(values[:, 0], chance=0.58)
    assert one.t[0] == pytest.approx(ours.t[0])


@pytest.mark.parametrize("alternative", ["greater", "less", "two-sided"])
def test_all_sign_flips_are_those_of_a_plain_loop(alternative: str) -> None:
    values = np.random.default_rng(1).normal(0.3, 1.0, size=(6, 4))
    ours = sign_flip(values, n_flips=64, alternative=alternative)  # type: ignore[arg-type]
    tail = {"greater": lambda t: t, "less": lambda t: -t, "two-sided": np.abs}[alternative]
    measured = tail(stats.ttest_1samp(values, 0).statistic)
    flips = [
        tail(stats.ttest_1samp(values * np.array(signs)[:, None], 0).statistic)
        for signs in itertools.product((1, -1), repeat=6)
    ]
    above = np.array([one >= measured - 1e-9 for one in flips])
    largest = np.array([one.max() >= measured - 1e-9 for one in flips])
    assert ours.exact
    assert ours.n_flips == 64
    np.testing.assert_allclose(ours.p, above.mean(0))
    np.testing.assert_allclose(ours.p_fwe, largest.mean(0))


def test_drawn_sign_flips_come_near_all_of_them() -> None:
    values = np.random.default_rng(2).normal(0.4, 1.0, size=(12, 20))
    every = sign_flip(values, n_flips=4096)
    drawn = sign_flip(values, n_flips=4000, seed=3)
    assert every.exact
    assert not drawn.exact
    np.testing.assert_allclose(drawn.p, every.p, atol=0.03)
    np.testing.assert_allclose(drawn.p_fwe, every.p_fwe, atol=0.03)
    assert drawn.p.min() >= 1 / 4001
    np.testing.assert_array_equal(drawn.p, sign_flip(values, n_flips=4000, seed=3).p)


@given(st.integers(2, 12), st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_places_may_come_in_parts(n: int, widths: list[int], seed: int) -> None:
    """The same signs in each part, and the highest of all parts: also where signs are drawn."""
    values = np.random.default_rng(seed).normal(0.2, 1.0, size=(n, sum(widths)))
    parts = SignFlips(n, n_flips=300, seed=seed)
    for part in np.split(values, np.cumsum(widths)[:-1], axis=1):
        parts.add(part)
    ours, whole = parts.result(), sign_flip(values, n_flips=300, seed=seed)
    assert ours.exact == whole.exact == (2**n <= 300)
    for name in ("t", "p", "p_fwe"):
        np.testing.assert_allclose(getattr(ours, name), getattr(whole, name))
    signs, _ = sign_patterns(n, 300, seed)
    t = stats.ttest_1samp(values, 0).statistic
    largest = [stats.ttest_1samp(values * one[:, None], 0).statistic.max() for one in signs[:20]]
    reached = np.array(
        [(np.array(largest) >= x - 1e-9).sum() for x in t]
    )  # of 20, so no more than:
    assert (reached <= np.round(ours.p_fwe * (len(signs) + (not ours.exact)))).all()


@pytest.mark.parametrize("n", [2, 4, 5, 12, 13, 40, 63])
def test_the_least_p_is_what_subjects_that_all_agree_get(n: int) -> None:
    signs, exact = sign_patterns(n, 5000, 0)
    assert signs.shape == ((2**n, n) if exact else (5000, n))
    assert exact == (n <= 12)
    assert set(np.unique(signs)) == {-1, 1}
    if exact:
        assert len(np.unique(signs, axis=0)) == 2**n
    values = 1 + np.random.default_rng(n).normal(0, 0.01, size=(n, 1))
    assert sign_flip(values).p[0] == least_p(n)
    assert (least_p(n) < 0.05) == (n >= 5), "fewer than five subjects cannot be significant"


def test_where_nothing_is_one_study_in_twenty_finds_something() -> None:
    """300 studies of eight subjects and 40 places that go together; scores are coarse, as accuracies."""
    rng = np.random.default_rng(5)
    found = {"p": 0, "p_fwe": 0}
    for _ in range(300):
        shared, own = rng.normal(size=(8, 1)), rng.normal(size=(8, 40))
        values = np.round((shared + own) * 0.05, 2)
        tested = sign_flip(values)
        found["p_fwe"] += tested.p_fwe.min() < 0.05
        found["p"] += tested.p[0] < 0.05
    assert 3 <= found["p"] <= 28, "300 x 0.05, and three deviations either way"
    assert 3 <= found["p_fwe"] <= 28


def test_places_without_a_number_stay_without_and_harm_none() -> None:
    values = np.random.default_rng(4).normal(0.5, 1.0, size=(6, 3))
    holes = values.copy()
    holes[2, 1] = np.nan
    assert np.isnan(one_sample_t(holes).p).tolist() == [False, True, False]
    ours, rest = sign_flip(holes), sign_flip(values[:, [0, 2]])
    assert np.isnan(ours.p_fwe).tolist() == [False, True, False]
    np.testing.assert_array_equal(ours.p_fwe[[0, 2]], rest.p_fwe)
    with pytest.raises(InputError, match="two subjects or more"):
        one_sample_t(values[:1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_false_discovery_rate_is_scipys_and_the_definitions(p: list[float]) -> None:
    ours = false_discovery_rate(p)
    np.testing.assert_allclose(ours, stats.false_discovery_control(p))
    m, ranked = len(p), sorted(p)
    for value, adjusted in zip(p, ours, strict=True):
        rank = ranked.index(value)
        least = min(min(1.0, ranked[j] * m / (j + 1)) for j in range(rank, m))
        assert adjusted == pytest.approx(least)


def test_undefined_p_values_do_not_count() -> None:
    p = np.array([0.01, np.nan, 0.04, 0.03])
    ours = false_discovery_rate(p)
    np.testing.assert_allclose(ours[[0, 2, 3]], stats.false_discovery_control(p[[0, 2, 3]]))
    assert np.isnan(ours[1])
    with pytest.raises(InputError, match=r"outside 0..1"):
        false_discovery_rate([1.2])


def test_subjects_that_agree_have_no_t_and_the_p_of_sign_flips() -> None:
    """Seven times 6 of 10 right: t would be infinite, or the quotient of rounding errors, and p 0."""
    scores = {"same": [0.6] * 7, "apart": [0.6, 0.7, 0.5, 0.6, 0.7, 0.6, 0.8], "chance": [0.5] * 7}
    records = [
        {
            "subject": f"{number}",
            "roi": roi,
            "target": "all",
            "scores": {"accuracy": value},
            "chance": {"accuracy": 0.5},
        }
        for roi, values in scores.items()
        for number, value in enumerate(values)
    ]
    same, apart, chance = group_rows(records)
    assert np.isnan(same["t"])
    assert same["p"] == same["p_flip"] == 1 / 2**7
    assert apart["p"] == pytest.approx(
        stats.ttest_1samp(scores["apart"], 0.5, alternative="greater").pvalue
    )
    assert np.isnan([chance["t"], chance["p"]]).all()
    assert same["p_flip_least"] == apart["p_flip_least"] == least_p(7)
    assert "7 subjects give p = " not in at_best(7), "0.0078 is small enough"
    assert at_best(6) == " Sign flips of 6 subjects give p = 0.016 at best."
    assert "0.062 at best, which is not below 0.05" in at_best(4)
    assert at_best(1) == at_best(0) == ""
    told = lines([same, apart, chance])
    assert ", all agree, p 0.0078" in told[0]
    assert ", t " in told[1]
    assert ", p " not in told[2]


def test_a_place_that_is_no_number_has_no_say_in_the_others() -> None:
    data = np.random.default_rng(0).normal(0.3, 1, (6, 5))
    with_inf = np.column_stack([data, [np.inf, 1, 1, 1, 1, 1]])
    alone, beside = sign_flip(data), sign_flip(with_inf)
    np.testing.assert_array_equal(beside.p_fwe[:5], alone.p_fwe)
    assert np.isnan(beside.p[5]) and np.isnan(beside.p_fwe[5])
