"""Scores against nilearn's SearchLight and against ``decode`` sphere by sphere."""

from __future__ import annotations

import pickle
import tracemalloc
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from mvpa_kit import design_of
from nibabel import Nifti1Image
from nilearn.decoding import SearchLight
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.model_selection import LeaveOneGroupOut
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR

from raypipe.errors import InputError, MemoryBudgetExceeded, RaypipeWarning, UnknownName
from raypipe.fmri.masks import Grid
from raypipe.fmri.mvpa import Design, EstimatorConfig, MvpaConfig, decode
from raypipe.fmri.mvpa.estimators import solver_squares
from raypipe.fmri.searchlight import (
    Block,
    SearchlightConfig,
    SearchlightWorker,
    assemble,
    plan_searchlight,
    score_block,
    searchlight,
)
from raypipe.fmri.searchlight.geometry import Spheres
from raypipe.fmri.searchlight.gram import GramWalk, update_pays
from raypipe.fmri.searchlight.plan import largest_bytes
from raypipe.fmri.sources import ArraySeries

SHAPE = (5, 4, 4)
GRID = Grid(shape=SHAPE, affine=np.diag([3.0, 3.0, 3.0, 1.0]))

REFERENCES: dict[str, Any] = {
    "svc": lambda: SVC(kernel="linear", C=0.7),
    "ridge_classifier": lambda: RidgeClassifier(alpha=2.0),
    "lda": lambda: LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
    "ridge": lambda: Ridge(alpha=2.0),
    "svr": lambda: SVR(kernel="linear", C=0.7),
}


def _brain(
    n_classes: int | None, n_runs: int = 3, each: int = 4
) -> tuple[np.ndarray, np.ndarray, Design]:
    """(series (n_voxels, T), mask, design): in one corner the patterns follow the labels."""
    rng = np.random.default_rng(n_classes or 9)
    n = n_runs * each * (n_classes or 3)
    runs = np.repeat(np.arange(n_runs), n // n_runs)
    mask = np.flatnonzero(rng.random(int(np.prod(SHAPE))) < 0.8)
    series = rng.normal(size=(len(mask), n))
    ijk = np.stack(np.unravel_index(mask, SHAPE), axis=1)
    near = np.abs(ijk - [1, 1, 1]).sum(axis=1) <= 2
    if n_classes is None:
        target = rng.normal(size=n)
        series[near] += 1.5 * target
        return series.astype(np.float32), mask, design_of(target, runs)
    kinds = np.tile(np.arange(n_classes), n // n_classes)
    series[near] += rng.normal(size=(int(near.sum()), n_classes))[:, kinds]
    labels = np.array(["cat", "face", "house", "shoe"])[kinds]
    return series.astype(np.float32), mask, design_of(labels, runs)


def _nilearn(
    series: np.ndarray, mask: np.ndarray, design: Design, model: Any, radius_mm: float, scoring: str
) -> np.ndarray:
    """Of every second voxel of the mask."""
    volume = np.zeros((int(np.prod(SHAPE)), series.shape[1]))
    volume[mask] = series
    inside = np.zeros(int(np.prod(SHAPE)), np.uint8)
    inside[mask] = 1
    centres = np.zeros_like(inside)
    centres[mask[::2]] = 1
    light = SearchLight(
        Nifti1Image(inside.reshape(SHAPE), GRID.affine),
        Nifti1Image(centres.reshape(SHAPE), GRID.affine),
        radius=radius_mm,
        estimator=model,
        scoring=scoring,
        cv=LeaveOneGroupOut(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        light.fit(
            Nifti1Image(volume.reshape(*SHAPE, -1), GRID.affine), design.encoded(), design.runs
        )
    return light.scores_.ravel()[mask[::2]]


@pytest.mark.parametrize("scale", ["zscore", "none"])
@pytest.mark.parametrize("radius_mm", [3.0, 6.5])  # fewer and more voxels than samples
@pytest.mark.parametrize(
    ("name", "n_classes"),
    [("svc", 2), ("svc", 4), ("ridge_classifier", 2), ("ridge_classifier", 3), ("lda", 2)],
)
def test_accuracies_are_those_of_nilearns_searchlight(
    name: str, n_classes: int, radius_mm: float, scale: str
) -> None:
    series, mask, design = _brain(n_classes)
    config = SearchlightConfig(
        radius_mm=radius_mm,
        centres_a_block=23,
        decode=MvpaConfig(
            model=EstimatorConfig(estimator=name, c=0.7, alpha=2.0),
            scale=scale,  # type: ignore[arg-type]
            scores=("accuracy",),
        ),
    )
    found = searchlight(ArraySeries(series, mask), GRID, design, config, centres=mask[::2])
    model = REFERENCES[name]()
    model = model if scale == "none" else make_pipeline(StandardScaler(), model)
    reference = _nilearn(series.astype(float), mask, design, model, radius_mm, "accuracy")
    np.testing.assert_array_equal(found.centres, mask[::2])
    np.testing.assert_allclose(found.scores["accuracy"], reference, atol=1e-12)
    assert reference.max() > 0.8
    assert np.ptp(reference) > 0.3


@pytest.mark.parametrize("name", ["ridge", "svr"])
@pytest.mark.parametrize("radius_mm", [3.0, 9.5])
def test_targets_are_predicted_as_nilearns_searchlight_does(name: str, radius_mm: float) -> None:
    series, mask, design = _brain(None)
    config = SearchlightConfig(
        radius_mm=radius_mm,
        decode=MvpaConfig(
            model=EstimatorConfig(estimator=name, c=0.7, alpha=2.0), scale="none", scores=("r2",)
        ),
    )
    light = searchlight(ArraySeries(series, mask), GRID, design, config, centres=mask[::2])
    found = light.scores["r2"]
    reference = _nilearn(series.astype(float), mask, design, REFERENCES[name](), radius_mm, "r2")
    np.testing.assert_allclose(found, reference, atol=1e-9 if name == "ridge" else 2e-3)
    assert reference.max() > 0.5


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("name", ["svc", "ridge_classifier"])
def test_scores_and_p_values_are_those_of_decoding_each_sphere(name: str, n_classes: int) -> None:
    series, mask, design = _brain(n_classes)
    decode_config = MvpaConfig(
        model=EstimatorConfig(estimator=name), n_permutations=9, exchange="sample", seed=4
    )
    config = SearchlightConfig(radius_mm=6.0, centres_a_block=10, decode=decode_config)
    reader = ArraySeries(series, mask)
    found = searchlight(reader, GRID, design, config, centres=mask[::7])
    plan = plan_searchlight(
        mask, GRID, config, n_volumes=series.shape[1], n_samples=len(design), centres=mask[::7]
    )
    highest = {name: np.full(9, -np.inf) for name in found.scores}
    seen = 0
    for block in plan.blocks():
        for i, centre in enumerate(block.centres):
            own = reader.read(block.voxels[block.spheres.of(i)])
            alone = decode(design.samples(own), design, decode_config)
            at = int(np.searchsorted(found.centres, centre))
            assert found.n_voxels[at] == len(own)
            for score, value in alone.scores.items():
                assert found.scores[score][at] == pytest.approx(value, abs=1e-9)
                assert found.p[score][at] == pytest.approx(alone.p[score])
                highest[score] = np.maximum(highest[score], alone.null[score])
            seen += 1
    assert seen == len(mask[::7])
    for score, values in found.scores.items():
        corrected = [(1 + (highest[score] >= value - 1e-10).sum()) / 10 for value in values]
        np.testing.assert_allclose(found.p_corrected[score], corrected)
        assert (found.p_corrected[score] >= found.p[score]).all()


def test_blocks_may_be_scored_anywhere_and_in_any_order() -> None:
    series, mask, design = _brain(2)
    config = SearchlightConfig(
        radius_mm=4.0, centres_a_block=16, decode=MvpaConfig(scores=("accuracy",))
    )
    reader = ArraySeries(series, mask)
    whole = searchlight(reader, GRID, design, config)
    plan = plan_searchlight(mask, GRID, config, n_volumes=series.shape[1], n_samples=len(design))
    worker = pickle.loads(pickle.dumps(SearchlightWorker(reader, design, config)))
    parts = [worker(block) for block in reversed(list(plan.blocks()))]
    joined = assemble(plan, parts)
    np.testing.assert_array_equal(joined.scores["accuracy"], whole.scores["accuracy"])
    with pytest.raises(InputError, match="score the missing ones"):
        assemble(plan, parts[1:])


def test_voxels_that_are_not_finite_are_left_out_of_spheres() -> None:
    series, mask, design = _brain(2)
    config = SearchlightConfig(radius_mm=4.0, decode=MvpaConfig(scores=("accuracy",)))
    holes = series.copy()
    holes[5, 3] = np.nan
    alone = mask[30]
    kept = np.delete(np.arange(len(mask)), 5)
    found = searchlight(ArraySeries(holes, mask), GRID, design, config)
    without = searchlight(ArraySeries(series[kept], mask[kept]), GRID, design, config)
    np.testing.assert_allclose(
        found.scores["accuracy"][kept], without.scores["accuracy"], atol=1e-12
    )
    lonely = SearchlightConfig(radius_mm=1.0, decode=MvpaConfig(scores=("accuracy",)))
    holes[30] = np.nan
    found = searchlight(ArraySeries(holes, mask), GRID, design, lonely)
    at = int(np.searchsorted(found.centres, alone))
    assert found.n_voxels[at] == 0
    assert np.isnan(found.scores["accuracy"][at])
    assert np.isfinite(np.delete(found.scores["accuracy"], [5, at])).all()


def test_the_map_is_an_image_on_the_scans_grid() -> None:
    series, mask, design = _brain(2)
    config = SearchlightConfig(radius_mm=4.0, decode=MvpaConfig(scores=("accuracy",)))
    steps: list[tuple[int, int]] = []
    found = searchlight(
        ArraySeries(series, mask),
        GRID,
        design,
        config,
        centres=mask[:30],
        done=lambda finished, of: steps.append((finished, of)),
    )
    image = found.image("accuracy")
    values = np.asarray(image.dataobj).ravel()
    np.testing.assert_array_equal(image.affine, GRID.affine)
    np.testing.assert_allclose(values[mask[:30]], found.scores["accuracy"], atol=1e-7)
    assert not values[mask[30:]].any()
    assert steps[-1] == (len(steps), len(steps))
    assert found.p == {}
    with pytest.raises(UnknownName, match="p were made for these"):
        found.image("accuracy", "p")


def test_folds_that_mix_runs_are_warned_of_once() -> None:
    series, mask, design = _brain(2)
    config = SearchlightConfig(
        radius_mm=3.0,
        centres_a_block=20,
        decode=MvpaConfig(cv="shuffled", n_folds=3, scores=("accuracy",)),
    )
    with pytest.warns(RaypipeWarning, match="folds mix runs") as heard:
        searchlight(ArraySeries(series, mask), GRID, design, config)
    assert len(heard) == 1


def test_a_scan_that_is_too_short_for_the_design_is_refused() -> None:
    series, mask, design = _brain(2)
    with pytest.raises(InputError, match="different scans"):
        SearchlightWorker(
            ArraySeries(series[:, :5], mask), design, SearchlightConfig(radius_mm=3.0)
        )
    block = next(
        plan_searchlight(
            mask, GRID, SearchlightConfig(radius_mm=3.0), n_volumes=24, n_samples=24
        ).blocks()
    )
    missing = ArraySeries(series[:10], mask[:10])
    with pytest.raises(InputError, match="not among the 10 voxels"):
        score_block(block, missing, design, SearchlightConfig(radius_mm=3.0))


@pytest.mark.parametrize("n_permutations", [0, 20])
def test_a_block_keeps_to_the_bytes_that_it_was_planned_with(n_permutations: int) -> None:
    rng = np.random.default_rng(0)
    grid = Grid(shape=(20, 20, 20), affine=np.diag([2.0, 2.0, 2.0, 1.0]))
    n = 120
    reader = ArraySeries(rng.normal(size=(8000, n)).astype(np.float32))
    design = design_of(np.array(["a", "b"])[np.arange(n) % 2], np.repeat(np.arange(3), n // 3))
    config = SearchlightConfig(
        radius_mm=8.0,
        budget_bytes=12 << 20,
        decode=MvpaConfig(n_permutations=n_permutations, exchange="sample", scores=("accuracy",)),
    )
    plan = plan_searchlight(np.arange(8000), grid, config, n_volumes=n, n_samples=n)
    block = max(plan.blocks(), key=lambda one: len(one.voxels))
    small = Block(
        number=0,
        centres=block.centres[:5],
        spheres=Spheres(block.voxels, block.spheres.start[:6], block.spheres.members),
    )
    score_block(small, reader, design, config)  # compiles
    tracemalloc.start()
    score_block(small, reader, design, config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.3 * config.budget_bytes < peak <= config.budget_bytes


def test_a_sphere_keeps_to_its_bytes_where_covariances_are_most_of_them() -> None:
    """257 voxels: 0.5 MiB each of four."""
    rng = np.random.default_rng(0)
    grid = Grid(shape=(9, 9, 9), affine=np.diag([2.0, 2.0, 2.0, 1.0]))
    n, middle = 60, np.array([364])
    reader = ArraySeries(rng.normal(size=(729, n)).astype(np.float32))
    design = design_of(np.array(["a", "b"])[np.arange(n) % 2], np.repeat(np.arange(3), n // 3))
    model = EstimatorConfig(estimator="lda")
    config = SearchlightConfig(
        radius_mm=8.0, decode=MvpaConfig(model=model, scores=("accuracy",), n_permutations=2)
    )
    needs = {"n_volumes": n, "n_samples": n, "squares": solver_squares(model, 2)}
    around = plan_searchlight(np.arange(729), grid, config, centres=middle, **needs)
    mask = next(around.blocks()).voxels
    plan = plan_searchlight(mask, grid, config, centres=middle, **needs)
    block = next(plan.blocks())
    score_block(block, reader, design, config)  # imports
    tracemalloc.start()
    score_block(block, reader, design, config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    planned, voxels = largest_bytes(plan, config, **needs)
    assert voxels == len(block.voxels) == 257
    assert planned / 1.5 < peak <= planned
    tight = replace(config, budget_bytes=planned - 1)
    with pytest.raises(MemoryBudgetExceeded, match="one sphere of 8 mm"):
        plan_searchlight(mask, grid, tight, centres=middle, **needs)


def test_walking_gives_the_gram_matrix_of_each_sphere() -> None:
    rng = np.random.default_rng(0)
    patterns = np.ascontiguousarray(rng.normal(size=(300, 20)))
    walk = GramWalk(patterns, 15)
    updates = 0
    for step in range(200):
        members = np.arange(step % 90, step % 90 + 200, dtype=np.int32)  # jumps back at 90
        updates += update_pays(2, 200)
        own = patterns[members]
        np.testing.assert_allclose(walk.at(members), own.T @ own[:, :15], atol=1e-10)
    assert updates == 200
    assert not update_pays(90, 100)
