"""Where the subjects' mean lies when their labels are permuted: the band of a mean, not a mean of bands."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from mvpa_kit import planted

from raypipe.fmri.mvpa import EstimatorConfig, MvpaConfig, decode
from raypipe.fmri.report.results import mean_band

N_SUBJECTS, N_PERMUTATIONS = 6, 400


def test_the_band_is_that_of_all_combinations() -> None:
    """Three subjects of seven permutations each: 343 means, counted one by one."""
    nulls = [np.random.default_rng(seed).normal(0.5, 0.05 * (1 + seed), 7) for seed in range(3)]
    means = [np.mean(one) for one in itertools.product(*nulls)]
    low, high = np.percentile(means, [2.5, 97.5])
    np.testing.assert_allclose(mean_band(nulls), (low, high), atol=0.03 * (high - low))


def test_one_subjects_band_is_its_own_and_nothing_has_none() -> None:
    null = np.random.default_rng(1).normal(size=200)
    assert mean_band([null]) == tuple(np.percentile(null, [2.5, 97.5]))
    undefined = np.append(null, np.nan)  # a permutation without a score has no say
    assert mean_band([undefined]) == mean_band([null])
    assert mean_band([null, np.full(5, np.nan)]) is None
    assert mean_band([np.empty(0), null]) is None
    assert mean_band([]) is None


def test_a_mean_spreads_less_than_each_subject() -> None:
    """Of independent subjects the band shrinks with the root of their number."""
    rng = np.random.default_rng(2)
    for n in (1, 4, 16):
        low, high = mean_band([rng.normal(0.5, 0.1, 2000) for _ in range(n)])
        assert high - low == pytest.approx(2 * 1.96 * 0.1 / np.sqrt(n), rel=0.06)


def test_subjects_of_one_design_and_seed_do_not_widen_the_band() -> None:
    """All saw the same labels in the same order, and the run's seed permutes them alike.

    Permutation i is then near the true labels in all subjects or in none: taken together, their scores
    rise and fall as one. The band is held against subjects whose permutations have seeds of their own.
    """
    model = EstimatorConfig(estimator="ridge_classifier")

    def nulls(seeds: list[int]) -> list[np.ndarray]:
        found = []
        for subject, seed in enumerate(seeds):
            patterns, design = planted(2, n_runs=2, each=4, n_voxels=12, signal=3.0)
            noise = np.random.default_rng(100 + subject).normal(0, 1, patterns.shape)
            config = MvpaConfig(
                model=model, scores=("accuracy",), n_permutations=N_PERMUTATIONS, seed=seed
            )
            found.append(decode(patterns + noise, design, config).null["accuracy"])
        return found

    alike = nulls([0] * N_SUBJECTS)
    apart = np.percentile(np.mean(nulls([*range(1, N_SUBJECTS + 1)]), axis=0), [2.5, 97.5])
    together = np.percentile(np.mean(alike, axis=0), [2.5, 97.5])
    assert np.ptp(together) > 1.4 * np.ptp(apart), "the fault that this test is for is not there"
    low, high = mean_band(alike)
    assert high - low == pytest.approx(np.ptp(apart), rel=0.15)
    assert (low + high) / 2 == pytest.approx(apart.mean(), abs=0.03)
