"""Trial-wise betas against nilearn's FirstLevelModel: one model of all trials, or one fitted a trial."""

from __future__ import annotations

import tracemalloc
import warnings

import numpy as np
import pandas as pd
import pytest
from glm_kit import TR_S, frame_of, images, series_of, some_events
from nilearn.glm.first_level import FirstLevelModel

from raypipe.errors import ConfigError, InputError, UnknownName
from raypipe.fmri.glm import GlmConfig, TrialRun, trial_betas
from raypipe.fmri.mvpa import MvpaConfig, decode
from raypipe.fmri.sources import ArraySeries
from raypipe.read.events import Events

SMALL = 30_000  # bytes: a few voxels a block


def _fitted(
    series: np.ndarray,
    table: pd.DataFrame,
    config: GlmConfig,
    names: list[str],
    confounds: pd.DataFrame | None = None,
    kept: np.ndarray | None = None,
) -> np.ndarray:
    """(n_voxels, len(names)) effects of nilearn's model of ``table``."""
    scan, mask = images(series)
    model = FirstLevelModel(
        t_r=config.t_r_s,
        hrf_model=config.hrf,
        drift_model=config.drift,
        noise_model=config.noise,
        mask_img=mask,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(scan, events=table, confounds=confounds, sample_masks=kept)
        maps = [model.compute_contrast(name, output_type="effect_size") for name in names]
    return np.stack([np.asarray(one.dataobj).ravel() for one in maps], axis=1)


def _all(series: np.ndarray, events: Events, config: GlmConfig) -> np.ndarray:
    table = frame_of(events)
    table["trial_type"] = [f"t{i:03d}" for i in range(len(table))]
    return _fitted(series, table, config, table["trial_type"].tolist())


def _separate(
    series: np.ndarray,
    events: Events,
    config: GlmConfig,
    others: str = "condition",
    **more: object,
) -> np.ndarray:
    """A model fitted for each trial, its event renamed."""
    found = []
    for trial in range(len(events.onset_s)):
        table = frame_of(events)
        if others == "all":
            table["trial_type"] = "rest"
        table.loc[trial, "trial_type"] = "one"
        found.append(_fitted(series, table, config, ["one"], **more))  # type: ignore[arg-type]
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("noise", ["ar1", "ols"])
@pytest.mark.parametrize("hrf", ["glover", "spm + derivative + dispersion"])
def test_least_squares_all_is_nilearns_model_of_all_trials(noise: str, hrf: str) -> None:
    config = GlmConfig(t_r_s=TR_S, noise=noise, hrf=hrf)  # type: ignore[arg-type]
    events = some_events(1)
    series = series_of(events, 1)
    run = TrialRun(series=ArraySeries(series), events=events)
    found = trial_betas([run], config, method="lsa", budget_bytes=SMALL)
    reference = _all(series, events, config)
    np.testing.assert_allclose(found.values, reference, rtol=1e-5, atol=1e-5)
    assert found.labels.tolist() == events.trial_type.tolist()


@pytest.mark.parametrize("noise", ["ar1", "ols"])
@pytest.mark.parametrize("hrf", ["glover", "spm", "glover + derivative"])
@pytest.mark.parametrize("others", ["condition", "all"])
def test_least_squares_separate_is_a_fit_a_trial(noise: str, hrf: str, others: str) -> None:
    config = GlmConfig(t_r_s=TR_S, noise=noise, hrf=hrf)  # type: ignore[arg-type]
    events = some_events(2, n=9, every_s=16.0)
    series = series_of(events, 2)
    run = TrialRun(series=ArraySeries(series), events=events)
    found = trial_betas([run], config, method="lss", others=others, budget_bytes=SMALL)  # type: ignore[arg-type]
    reference = _separate(series, events, config, others)
    np.testing.assert_allclose(found.values, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("noise", ["ar1", "ols"])
def test_confounds_scrubbing_and_a_lone_trial_as_nilearn_fits_them(noise: str) -> None:
    config = GlmConfig(t_r_s=TR_S, noise=noise, hrf="spm + derivative")  # type: ignore[arg-type]
    events = some_events(5, n=8, every_s=18.0)
    kinds = events.trial_type.copy()
    kinds[:] = "face"
    kinds[1], kinds[5:] = "shoe", "house"  # shoe has one trial: nothing else stands for it
    events = Events(onset_s=events.onset_s, duration_s=events.duration_s, trial_type=kinds)
    series = series_of(events, 5)
    confounds = np.random.default_rng(0).normal(size=(90, 2)) * 100
    kept = np.delete(np.arange(90), [0, 30, 31, 60])
    run = TrialRun(series=ArraySeries(series), events=events, confounds=confounds, kept=kept)
    found = trial_betas([run], config, method="lss")
    reference = _separate(
        series, events, config, confounds=pd.DataFrame(confounds, columns=["a", "b"]), kept=kept
    )
    np.testing.assert_allclose(found.values, reference, rtol=1e-5, atol=1e-5)


def test_other_types_are_conditions_not_trials() -> None:
    config = GlmConfig(t_r_s=TR_S)
    events = some_events(3)
    series = series_of(events, 3)
    run = TrialRun(series=ArraySeries(series), events=events)
    found = trial_betas([run], config, method="lsa", keep=["face"])
    table = frame_of(events)
    own = np.flatnonzero(table["trial_type"] == "face")
    names = [f"t{i}" for i in own]
    table.loc[own, "trial_type"] = names
    reference = _fitted(series, table, config, names)
    np.testing.assert_allclose(found.values, reference, rtol=1e-5, atol=1e-5)
    both = trial_betas([run], config, method="lss", keep=["face"])
    every = trial_betas([run], config, method="lss")
    np.testing.assert_allclose(both.values, every.values[:, own], rtol=1e-5)
    with pytest.raises(UnknownName, match="cat"):
        trial_betas([run], config, method="lsa", keep=["cat"])


def test_betas_are_samples_to_decode_with_runs_held_out() -> None:
    config = GlmConfig(t_r_s=TR_S)
    weights = np.random.default_rng(7).normal(size=24)
    runs = []
    for seed in range(4):
        events = some_events(seed, kinds=2)
        series = series_of(some_events(seed + 50), seed + 50)
        times = np.arange(90) * TR_S
        for onset, kind in zip(events.onset_s, events.trial_type, strict=True):
            sign = 1 if kind == "face" else -1
            series += sign * 20 * weights[:, None] * np.exp(-((times - onset - 6) ** 2) / 8)
        runs.append(TrialRun(series=ArraySeries(series.astype(np.float32)), events=events))
    found = trial_betas(runs, config, method="lss")
    design = found.design()
    assert found.values.shape == (24, 48)
    assert np.bincount(design.runs).tolist() == [12, 12, 12, 12]
    result = decode(design.samples(found.values), design, MvpaConfig(scores=("accuracy",)))
    assert len(result.folds["accuracy"]) == 4
    assert result.scores["accuracy"] > 0.9
    again = np.empty((24, 48), np.float32)
    trial_betas(runs, config, method="lss", out=again)
    np.testing.assert_array_equal(again, found.values)


@pytest.mark.parametrize("noise", ["ar1", "ols"])
@pytest.mark.parametrize("method", ["lsa", "lss"])
def test_the_work_keeps_to_its_budget(method: str, noise: str) -> None:
    """7,200 voxels: 2.6 MB as they are, some 25 MB and more at once in a model of theirs."""
    config = GlmConfig(t_r_s=TR_S, noise=noise, hrf="spm + derivative")  # type: ignore[arg-type]
    events = some_events(4)
    many = ArraySeries(np.tile(series_of(events, 4), (300, 1)))
    run = TrialRun(series=many, events=events)
    budget = 4 << 20
    out = np.empty((7200, 12), np.float32)
    trial_betas([run], config, method=method, budget_bytes=budget, out=out)  # type: ignore[arg-type]
    first = out.copy()
    tracemalloc.start()
    trial_betas([run], config, method=method, budget_bytes=budget, out=out)  # type: ignore[arg-type]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    flags_and_indices = 7200 * (8 + 2 + 8)
    assert peak - flags_and_indices <= budget
    assert peak > budget / 4
    np.testing.assert_array_equal(out, first)


@pytest.mark.parametrize("method", ["lsa", "lss"])
def test_trials_that_cannot_be_told_are_named(method: str) -> None:
    config = GlmConfig(t_r_s=TR_S)
    events = some_events(3)
    series = ArraySeries(series_of(events, 3))

    def of(onset: np.ndarray) -> TrialRun:
        moved = Events(onset_s=onset, duration_s=events.duration_s, trial_type=events.trial_type)
        return TrialRun(series=series, events=moved)

    late = events.onset_s.copy()
    late[-1] = 500.0
    with pytest.raises(InputError, match=r"trial 11 .* at 500 s\) has no response"):
        trial_betas([of(late)], config, method=method)  # type: ignore[arg-type]
    if method == "lsa":
        twin = events.onset_s.copy()
        twin[3] = twin[2]
        with pytest.raises(InputError, match="cannot be told"):
            trial_betas([of(twin)], config, method="lsa")
    fir = GlmConfig(t_r_s=TR_S, hrf="fir")
    with pytest.raises(ConfigError, match="no single value a trial"):
        trial_betas([of(events.onset_s)], fir, method=method)  # type: ignore[arg-type]
