"""Cleaning against nilearn.signal.clean in float64; what nilearn leaves open, against a plain rule."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nilearn import signal
from scipy.interpolate import CubicSpline

from raypipe.errors import ConfigError, InputError, RaypipeWarning
from raypipe.fmri.clean import CleanConfig, clean
from raypipe.fmri.clean import series as cleaning

T, T_R_S = 90, 2.0
FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "band": {"filter": "butterworth", "high_pass_hz": 0.01, "low_pass_hz": 0.1},
    "high": {"filter": "butterworth", "high_pass_hz": 0.008},
    "low": {"filter": "butterworth", "low_pass_hz": 0.12},
    "cosine": {"filter": "cosine", "high_pass_hz": 0.01},
}
# Volumes scrubbed of each run of 45: none; some; both at the ends and within.
SCRUBS: dict[str, tuple[int, ...]] = {"none": (), "within": (7, 8, 20), "ends": (0, 1, 9, 30)}


@pytest.fixture(autouse=True, params=["plain", "compiled"], scope="module")
def kind_of_code(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test runs on the steps in numpy, for small series, and on the compiled ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cleaning, "COMPILED_FROM", 0 if request.param == "compiled" else 1 << 62)
        yield


def _series(seed: int, n_voxels: int, n_volumes: int) -> np.ndarray:
    """(n_voxels, n_volumes) float32 that drift about 1000."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(size=(n_voxels, n_volumes))
    return (1000 + steps.cumsum(1) + rng.normal(size=steps.shape) * 3).astype(np.float32)


def _confounds(kind: str, n_volumes: int) -> np.ndarray | None:
    rng = np.random.default_rng(5)
    walk = rng.normal(size=(n_volumes, 4)).cumsum(0)
    if kind == "none":
        return None
    if kind == "walk":
        return walk
    constant = np.full((n_volumes, 1), 3.0)
    return np.hstack((walk, walk[:, :1] * 2 + walk[:, 1:2], constant))  # rank 4 of 6


def _nilearn(series: np.ndarray, config: CleanConfig, **arguments: Any) -> np.ndarray:
    """nilearn's answer, (n_voxels, m) float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = signal.clean(
            series.T.astype(np.float64),
            detrend=config.detrend,
            standardize=config.standardize,
            filter=config.filter or False,
            low_pass=config.low_pass_hz,
            high_pass=config.high_pass_hz,
            t_r=config.t_r_s,
            extrapolate=config.extrapolate,
            ensure_finite=config.ensure_finite,
            standardize_confounds=config.standardize_confounds,
            **arguments,
        )
    return answer.T


def _assert_equal(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Within 1e-5 of the voxel's largest value, or of 1 where all are smaller."""
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    scale = np.maximum(np.abs(theirs).max(axis=1, keepdims=True), 1.0)
    np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("detrend", [False, True])
@pytest.mark.parametrize("standardize", [None, "zscore_sample", "psc"])
@pytest.mark.filterwarnings("ignore::raypipe.errors.RaypipeWarning")
def test_equals_nilearn_in_every_combination(filters: str, detrend: bool, standardize: Any) -> None:
    config = CleanConfig(detrend=detrend, standardize=standardize, t_r_s=T_R_S, **FILTERS[filters])
    series = _series(1, 5, T)
    runs = np.repeat([0, 1], T // 2)
    for kind, scrub, two_runs in itertools.product(
        ("none", "walk", "redundant"), SCRUBS, (False, True)
    ):
        confounds = _confounds(kind, T)
        places = [
            v + offset for offset in ((0, T // 2) if two_runs else (0,)) for v in SCRUBS[scrub]
        ]
        kept = np.setdiff1d(np.arange(T), places)
        mask = {} if scrub == "none" else {"sample_mask": kept}
        theirs = dict(mask)
        if two_runs and mask:
            theirs = {"sample_mask": [kept[kept < T // 2], kept[kept >= T // 2] - T // 2]}
        also = {"runs": runs} if two_runs else {}
        ours = clean(series, config, confounds=confounds, **mask, **also)
        _assert_equal(ours.values, _nilearn(series, config, confounds=confounds, **theirs, **also))
        np.testing.assert_array_equal(ours.volumes, kept if mask else np.arange(T))


@pytest.mark.parametrize("detrend", [False, True])
@pytest.mark.parametrize("filters", FILTERS)
def test_confounds_may_be_left_unscaled(filters: str, detrend: bool) -> None:
    config = CleanConfig(
        detrend=detrend, standardize_confounds=False, t_r_s=T_R_S, **FILTERS[filters]
    )
    series, confounds = _series(2, 3, T), _confounds("redundant", T)
    ours = clean(series, config, confounds=confounds).values
    _assert_equal(ours, _nilearn(series, config, confounds=confounds))


@settings(max_examples=60)
@given(
    n_volumes=st.integers(60, 130),
    seed=st.integers(0, 2**31),
    part=st.floats(0.01, 0.4),
    extrapolate=st.booleans(),
    filters=st.sampled_from(["band", "high", "low", "cosine", "none"]),
)
def test_any_scrubbing_equals_nilearn_or_is_refused(
    n_volumes: int, seed: int, part: float, extrapolate: bool, filters: str
) -> None:
    mask = np.random.default_rng(seed).random(n_volumes) > part
    mask[[5, 30, 50]] = True
    config = CleanConfig(
        detrend=True,
        standardize="zscore_sample",
        t_r_s=T_R_S,
        extrapolate=extrapolate,
        **FILTERS[filters],
    )
    series, confounds = _series(3, 2, n_volumes), _confounds("walk", n_volumes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RaypipeWarning)
        try:
            ours = clean(series, config, confounds=confounds, sample_mask=mask).values
        except ConfigError as error:  # nilearn gives other volumes than asked for
            assert "shifted" in str(error)
            assert not mask[0]
            return
    theirs = _nilearn(series, config, confounds=confounds, sample_mask=mask)
    scale = np.maximum(np.abs(theirs).max(), 1)
    np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=1e-5)


def _interpolate_all(volumes: np.ndarray, kept: np.ndarray, t_r: float, extrapolate: bool) -> Any:
    """What nilearn's _interpolate_volumes is for: every scrubbed volume by the spline."""
    times = np.arange(len(volumes)) * t_r
    scrubbed = np.setdiff1d(np.arange(len(volumes)), kept)
    spline = CubicSpline(times[kept], volumes[kept], extrapolate=extrapolate)
    volumes[scrubbed] = spline(times[scrubbed])
    return volumes


@pytest.mark.parametrize("scrubbed", [(5, 84), (0, 89), (0, 1, 40, 49, 88, 89), (3, 4)])
def test_all_scrubbed_volumes_are_interpolated_on_request(
    scrubbed: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CleanConfig(detrend=True, t_r_s=T_R_S, scrub_interpolation="all", **FILTERS["band"])
    series, confounds = _series(4, 3, T), _confounds("walk", T)
    kept = np.setdiff1d(np.arange(T), scrubbed)
    monkeypatch.setattr(signal, "_interpolate_volumes", _interpolate_all)
    ours = clean(series, config, confounds=confounds, sample_mask=kept)
    _assert_equal(ours.values, _nilearn(series, config, confounds=confounds, sample_mask=kept))
    np.testing.assert_array_equal(ours.volumes, kept)


def test_says_where_nilearn_leaves_scrubbed_volumes_uninterpolated() -> None:
    config = CleanConfig(t_r_s=T_R_S, **FILTERS["band"])
    mask = np.ones(T, bool)
    mask[[5, 84]] = False
    with pytest.warns(RaypipeWarning, match="volumes 5, 84 enter the filter as they are"):
        clean(_series(4, 1, T), config, sample_mask=mask)


def test_refuses_where_nilearn_returns_other_volumes_than_asked_for() -> None:
    wide = CleanConfig(t_r_s=T_R_S, filter="butterworth", low_pass_hz=0.2499)  # passes nearly all
    mask = np.ones(T, bool)
    mask[[0, 89]] = False
    series = np.random.default_rng(0).normal(size=(1, T))
    theirs = _nilearn(series, wide, sample_mask=mask)[0]
    assert np.corrcoef(theirs, series[0, 0:88])[0, 1] > 0.95  # one too early
    assert abs(np.corrcoef(theirs, series[0, 1:89])[0, 1]) < 0.3
    with pytest.raises(ConfigError, match="shifted by 1; give scrub_interpolation all"):
        clean(series, wide, sample_mask=mask)


def test_first_row_of_confounds_is_filled_and_said() -> None:
    config = CleanConfig(detrend=True, standardize="zscore_sample")
    series, confounds = _series(6, 3, T), _confounds("walk", T)
    assert confounds is not None
    confounds[0, [1, 3]] = np.nan
    with pytest.warns(RaypipeWarning, match="2 of 4 confounds have no value in the first row"):
        ours = clean(series, config, confounds=confounds)
    filled = confounds.copy()
    filled[0, [1, 3]] = confounds[1, [1, 3]]
    _assert_equal(ours.values, _nilearn(series, config, confounds=filled))
    confounds[4, 2] = np.nan
    with (
        pytest.warns(RaypipeWarning),
        pytest.raises(InputError, match="column 2 holds nan in row 4"),
    ):
        clean(series, config, confounds=confounds)


@pytest.mark.parametrize("standardize", ["zscore_sample", "psc"])
@pytest.mark.parametrize("filters", ["none", "band"])
def test_voxels_without_numbers_or_variance_are_counted(filters: str, standardize: Any) -> None:
    series = _series(7, 130, T)
    series[3, 10], series[70, 0], series[4] = np.nan, np.inf, 0.1
    config = CleanConfig(detrend=True, standardize=standardize, t_r_s=T_R_S, **FILTERS[filters])
    ours = clean(series, config)
    assert np.flatnonzero(ours.not_finite).tolist() == [3, 70]
    assert np.flatnonzero(ours.constant).tolist() == [4]
    assert "2 voxels hold NaN or infinity, 1 are constant" in ours.summary()
    assert np.isnan(ours.values[[3, 70]]).all()
    np.testing.assert_allclose(ours.values[4], 0, atol=1e-6)
    rest = np.setdiff1d(np.arange(130), [3, 4, 70])
    _assert_equal(ours.values[rest], _nilearn(series[rest], config))


def test_values_that_are_not_finite_can_be_read_as_zero() -> None:
    series = _series(8, 3, T)
    series[1, 10] = np.nan
    config = CleanConfig(detrend=True, ensure_finite=True, t_r_s=T_R_S, **FILTERS["low"])
    _assert_equal(clean(series, config).values, _nilearn(series, config))


@pytest.mark.parametrize("dtype", ["int16", ">i2", "uint8", "float64", ">f4"])
def test_any_real_type_any_threads_and_a_given_output(dtype: str) -> None:
    series = (_series(9, 300, T) / 8).astype(dtype)
    config = CleanConfig(standardize="zscore_sample", t_r_s=T_R_S, **FILTERS["band"])
    out = np.empty((300, T), np.float32)
    answer = clean(series, config, threads=2, out=out)
    assert answer.values is out
    _assert_equal(out, _nilearn(series.astype(np.float64), config))
    np.testing.assert_array_equal(out, clean(series, config).values)


def test_one_volume_stays_as_it_is() -> None:
    config = CleanConfig(detrend=True, standardize="zscore_sample")
    with pytest.warns(RaypipeWarning, match="one volume is left"):
        assert clean(np.full((2, 1), 7.0), config).values.tolist() == [[7.0], [7.0]]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"filter": "butterworth", "t_r_s": 2.0}, "no cutoff"),
        ({"filter": "cosine", "low_pass_hz": 0.1}, "cosine takes high_pass_hz"),
        ({"high_pass_hz": 0.01}, "no filter"),
        (
            {"filter": "butterworth", "high_pass_hz": 0.2, "low_pass_hz": 0.1},
            "nothing would be left",
        ),
        ({"standardize": "zscore"}, "standardize 'zscore' is not known"),
        ({"filter": "butterworth", "low_pass_hz": -1.0}, "not above 0"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        CleanConfig(**options)


def test_input_that_does_not_fit_is_refused() -> None:
    series, plain = _series(1, 2, T), CleanConfig()
    for arguments, match in (
        ({"confounds": np.zeros((T - 1, 2))}, r"confounds have shape \(89, 2\)"),
        ({"sample_mask": np.ones(T + 1, bool)}, "sample_mask has shape"),
        ({"sample_mask": np.zeros(T, bool)}, "keeps no volumes"),
        ({"sample_mask": [4, 3]}, "must rise"),
        ({"runs": np.zeros(T - 1)}, "runs have shape"),
        ({"out": np.empty((2, T))}, "float32; make it so"),
    ):
        with pytest.raises(InputError, match=match):
            clean(series, plain, **arguments)
    with pytest.raises(ConfigError, match="needs t_r_s"):
        clean(series, CleanConfig(filter="butterworth", low_pass_hz=0.1))
    with pytest.raises(ConfigError, match=r"not below 0\.25 Hz"):
        clean(series, CleanConfig(filter="butterworth", low_pass_hz=0.3, t_r_s=2.0))
    with pytest.raises(InputError, match="needs more than"):
        clean(series[:, :20], CleanConfig(t_r_s=T_R_S, **FILTERS["band"]))


def test_nilearns_booleans_are_understood() -> None:
    config = CleanConfig(standardize=True, filter=False)  # type: ignore[arg-type]
    assert (config.standardize, config.filter) == ("zscore_sample", None)
