"""Block-wise models against nilearn's FirstLevelModel: effects, variances, statistics, z."""

from __future__ import annotations

import tracemalloc
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from glm_kit import TR_S, frame_of, images, series_of, some_events
from nilearn.glm.first_level import FirstLevelModel, run_glm

from raypipe.errors import (
    ConfigError,
    InputError,
    MemoryBudgetExceeded,
    RaypipeWarning,
    UnknownName,
)
from raypipe.fmri.glm import (
    DesignMatrix,
    GlmConfig,
    GlmResult,
    GlmRun,
    condition_design,
    fit_glm,
)
from raypipe.fmri.glm.blocks import voxels_a_block
from raypipe.fmri.sources import ArraySeries

ONE_BY_ONE = 12_000  # bytes: a few voxels a block


def _reference(
    series: list[np.ndarray],
    designs: list[DesignMatrix],
    config: GlmConfig,
    contrast: Any,
    kept: list[np.ndarray] | None = None,
    stat_type: str | None = None,
) -> dict[str, np.ndarray]:
    """nilearn's maps, (n_voxels,) each."""
    scans, mask = zip(*map(images, series), strict=True)
    model = FirstLevelModel(
        mask_img=mask[0],
        noise_model=config.noise,
        signal_scaling=0 if config.scaling == "percent" else False,
        minimize_memory=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(list(scans), design_matrices=[d.frame() for d in designs], sample_masks=kept)
        maps = model.compute_contrast(contrast, stat_type=stat_type, output_type="all")
    return {
        name: np.asarray(image.dataobj).reshape(24, *image.shape[3:])
        for name, image in maps.items()
    }


def _run(seed: int, config: GlmConfig, confounds: np.ndarray | None = None) -> GlmRun:
    events = some_events(seed)
    series = series_of(events, seed)
    design = condition_design(events, series.shape[1], config, confounds=confounds)
    return GlmRun(series=ArraySeries(series), design=design)


def _check(result: GlmResult, name: str, reference: dict[str, np.ndarray], tol: float) -> None:
    found = result.maps[name]
    pairs = {
        "effect_size": found.effect,
        "effect_variance": found.variance,
        "stat": found.stat(),
        "z_score": found.z_score(),
        "p_value": found.p_value(),
    }
    for kind, values in pairs.items():
        wanted = reference[kind]
        values = values.T if values.ndim == 2 else values
        np.testing.assert_allclose(values, wanted, rtol=tol, atol=tol * np.abs(wanted).max())


def _series(run: GlmRun) -> np.ndarray:
    return run.series.read(run.series.voxels)


@pytest.mark.parametrize("noise", ["ar1", "ols"])
@pytest.mark.parametrize("scaling", ["percent", "none"])
@pytest.mark.parametrize("hrf", ["glover", "spm + derivative"])
def test_contrast_maps_are_nilearns(noise: str, scaling: str, hrf: str) -> None:
    config = GlmConfig(t_r_s=TR_S, noise=noise, scaling=scaling, hrf=hrf)  # type: ignore[arg-type]
    run = _run(3, config)
    result = fit_glm([run], {"a": "face - house"}, config, budget_bytes=ONE_BY_ONE)
    reference = _reference([_series(run)], [run.design], config, "face - house")
    assert np.abs(reference["stat"]).max() > 2
    _check(result, "a", reference, 1e-6)


def test_the_design_is_the_one_that_nilearn_makes_of_events() -> None:
    events, config = some_events(1), GlmConfig(t_r_s=TR_S, slice_time_ref=0.5, high_pass_hz=0.02)
    scan, mask = images(series_of(events, 1))
    model = FirstLevelModel(t_r=TR_S, slice_time_ref=0.5, high_pass=0.02, mask_img=mask)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fit(scan, events=frame_of(events))
    ours = condition_design(events, scan.shape[3], config)
    assert list(ours.names) == list(model.design_matrices_[0].columns)
    np.testing.assert_allclose(ours.matrix, model.design_matrices_[0].to_numpy())


def test_runs_are_combined_as_fixed_effects_with_confounds_of_any_scale() -> None:
    config = GlmConfig(t_r_s=TR_S)
    rng = np.random.default_rng(0)
    confounds = rng.normal(size=(90, 3)) * np.array([1e4, 1.0, 1e-4])
    runs = [_run(5, config, confounds), _run(6, config), _run(7, config)]
    designs = [run.design for run in runs]
    result = fit_glm(runs, {"face": "face", "diff": "face - 0.5 * shoe"}, config)
    for name, contrast in (("face", "face"), ("diff", "face - 0.5 * shoe")):
        reference = _reference([_series(run) for run in runs], designs, config, contrast)
        _check(result, name, reference, 1e-6)
    assert result.n_runs == 3


@pytest.mark.parametrize("noise", ["ar1", "ols"])
def test_several_weights_are_tested_by_f(noise: str) -> None:
    config = GlmConfig(t_r_s=TR_S, noise=noise)  # type: ignore[arg-type]
    run = _run(3, config)
    weights = np.zeros((2, len(run.design.names)))
    weights[0, :2] = 1, -1
    weights[1, 1:3] = 1, -1
    result = fit_glm([run], {"any": weights}, config)
    reference = _reference([_series(run)], [run.design], config, weights, stat_type="F")
    found = result.maps["any"]
    np.testing.assert_allclose(found.stat(), reference["stat"], rtol=1e-6)
    np.testing.assert_allclose(found.z_score(), reference["z_score"], rtol=1e-6, atol=1e-6)


def test_scrubbed_volumes_are_left_out_of_series_and_design() -> None:
    config = GlmConfig(t_r_s=TR_S)
    run = _run(9, config)
    kept = np.delete(np.arange(90), [0, 1, 40, 41, 42])
    result = fit_glm(
        [GlmRun(series=run.series, design=run.design, kept=kept)], {"a": "face"}, config
    )
    reference = _reference([_series(run)], [run.design], config, "face", kept=[kept])
    _check(result, "a", reference, 1e-6)


def test_a_design_without_constant_is_centred_as_nilearn_does() -> None:
    """nilearn takes the mean residual of all voxels from each before it estimates the noise."""
    config = GlmConfig(t_r_s=TR_S, scaling="none")
    run = _run(2, config)
    names = run.design.names[:3]
    design = DesignMatrix(matrix=run.design.matrix[:, :3], names=names)
    series = _series(run) - 400.0
    result = fit_glm(
        [GlmRun(series=ArraySeries(series), design=design)],
        {"a": "face"},
        config,
        budget_bytes=ONE_BY_ONE,
    )
    _check(result, "a", _reference([series], [design], config, "face"), 1e-6)


def test_the_size_of_blocks_changes_nothing() -> None:
    config = GlmConfig(t_r_s=TR_S)
    run = _run(4, config)
    whole = fit_glm([run], {"a": "face"}, config).maps["a"]
    parts = fit_glm([run], {"a": "face"}, config, budget_bytes=4_000).maps["a"]
    np.testing.assert_allclose(parts.stat(), whole.stat(), rtol=1e-9)


def test_constant_and_missing_voxels_are_counted_and_told_apart() -> None:
    config = GlmConfig(t_r_s=TR_S)
    run = _run(4, config)
    series = _series(run)
    series[3], series[7, 5] = 600.0, np.nan
    result = fit_glm([GlmRun(series=ArraySeries(series), design=run.design)], {"a": "face"}, config)
    stat = result.maps["a"].stat()
    assert np.flatnonzero(result.constant).tolist() == [3]
    assert np.flatnonzero(result.not_finite).tolist() == [7]
    assert stat[3] == 0
    assert np.isnan(stat[7])
    assert np.isfinite(np.delete(stat, 7)).all()
    assert "1 voxels hold NaN" in result.summary()


def test_what_cannot_be_told_is_refused() -> None:
    config = GlmConfig(t_r_s=TR_S)
    run = _run(4, config)
    matrix = np.column_stack((run.design.matrix, run.design.matrix[:, 0]))
    twice = DesignMatrix(matrix=matrix, names=(*run.design.names, "again"))
    with pytest.raises(InputError, match="cannot be told"):
        fit_glm([GlmRun(series=run.series, design=twice)], {"a": "face"}, config)
    same = fit_glm([GlmRun(series=run.series, design=twice)], {"a": "house"}, config)
    alone = fit_glm([run], {"a": "house"}, config)
    np.testing.assert_allclose(same.maps["a"].effect, alone.maps["a"].effect, rtol=1e-7)
    with pytest.raises(InputError, match="not made of the design's columns"):
        fit_glm([run], {"a": "cat"}, config)
    with pytest.raises(InputError, match="one weight a column"):
        fit_glm([run], {"a": (1.0, 0.0)}, config)
    with pytest.warns(RaypipeWarning, match="is 0 in run 1"):
        zero = np.zeros(len(run.design.names))
        fit_glm([run, run], {"a": ["face", zero]}, config)
    with pytest.raises(InputError, match="leave no noise"):
        fit_glm(
            [
                GlmRun(
                    series=ArraySeries(series_of(some_events(4), 4)[:, :5]),
                    design=run.design.rows(np.arange(5)),
                )
            ],
            {"a": "face"},
            config,
        )


def test_the_work_keeps_to_its_budget() -> None:
    config = GlmConfig(t_r_s=TR_S)
    run = _run(4, config)
    many = ArraySeries(np.tile(_series(run), (300, 1)))  # 7200 voxels: 2.6 MB as they are
    budget = 4 << 20
    run = GlmRun(series=many, design=run.design)
    fit_glm([run], {"a": "face"}, config)
    tracemalloc.start()
    result = fit_glm([run], {"a": "face"}, config, budget_bytes=budget)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    found = result.maps["a"]
    kept = 2 * found.effect.nbytes + 2 * found.variance.nbytes + 10 * len(result.voxels)
    assert peak - kept <= budget
    assert peak > budget / 4


def test_options_are_checked() -> None:
    with pytest.raises(UnknownName, match="hrf"):
        GlmConfig(t_r_s=2.0, hrf="gauss")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="above 0"):
        GlmConfig(t_r_s=0.0)
    with pytest.raises(MemoryBudgetExceeded, match="give more"):
        voxels_a_block(1000, 20, 4, 10_000)
    assert voxels_a_block(100, 10, 0, 10 * (100 * 28 + 480)) == 10


def test_nilearn_itself_gives_the_noise_coefficients() -> None:
    from raypipe.fmri.glm.noise import coefficient_bins, moments
    from raypipe.fmri.glm.projection import Projection

    config = GlmConfig(t_r_s=TR_S)
    run = _run(8, config)
    series = _series(run).astype(np.float64)
    labels, _ = run_glm(series.T, run.design.matrix, noise_model="ar1")
    sums = moments(Projection.of(run.design.matrix).split(series)[1])
    bins = coefficient_bins(sums.square, sums.lagged, series.shape[1], 100)
    assert [str(one) for one in bins / 100] == labels.tolist()
    assert len(np.unique(bins)) > 5
    assert isinstance(run.design.frame(), pd.DataFrame)
