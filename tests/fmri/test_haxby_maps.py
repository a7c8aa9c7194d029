"""Real fMRI (Haxby 2001, half a slice): a model, trial-wise betas and a searchlight, as nilearn has them."""

from __future__ import annotations

import warnings
from functools import cache
from itertools import pairwise
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from nilearn.decoding import SearchLight
from nilearn.glm.first_level import FirstLevelModel
from sklearn.model_selection import LeaveOneGroupOut
from sklearn.svm import SVC

from raypipe.fmri.clean import CleanConfig
from raypipe.fmri.glm import GlmConfig, GlmRun, TrialRun, condition_design, fit_glm, trial_betas
from raypipe.fmri.masks import Grid, mask_voxels
from raypipe.fmri.mvpa import MvpaConfig, decode, design_of_volumes
from raypipe.fmri.searchlight import SearchlightConfig, searchlight
from raypipe.fmri.sources import ArraySeries, CleanedSeries
from raypipe.read.events import Events

TR_S = 2.5


@pytest.fixture
def folder(real_data: Path) -> Path:
    if not (real_data / "haxby").is_dir():
        pytest.skip(f"real fMRI is not at {real_data / 'haxby'}; set RAYPIPE_REAL_DATA")
    return real_data / "haxby"


@cache
def _scan(folder: Path) -> tuple[np.ndarray, np.ndarray, Grid, np.ndarray, np.ndarray]:
    """(series (530, 1452), voxels, grid, labels (1452,), runs (1452,))."""
    labels, runs = np.loadtxt(folder / "attributes_literal.txt", dtype=str, unpack=True)
    image = nibabel.load(folder / "bold.nii.gz")
    voxels = mask_voxels(folder / "mask.nii.gz", Grid.of(image))
    series = np.asarray(image.dataobj).reshape(-1, image.shape[-1])[voxels]
    return series.astype(np.float32), voxels, Grid.of(image), labels, runs.astype(int)


def _blocks_as_events(labels: np.ndarray) -> Events:
    """A run's stretches of one label as events."""
    edge = np.flatnonzero(np.concatenate(([True], labels[1:] != labels[:-1], [True])))
    kept = [(a, b) for a, b in pairwise(edge) if labels[a] != "rest"]
    onset = np.array([a * TR_S for a, _ in kept])
    return Events(
        onset_s=onset,
        duration_s=np.array([(b - a) * TR_S for a, b in kept]),
        trial_type=np.array([labels[a] for a, _ in kept], dtype=np.str_),
    )


def test_a_real_runs_contrast_is_nilearns(folder: Path) -> None:
    series, voxels, grid, labels, runs = _scan(folder)
    config = GlmConfig(t_r_s=TR_S)
    parts, scans, tables = [], [], []
    mask = np.zeros(int(np.prod(grid.shape)), np.uint8)
    mask[voxels] = 1
    for run in range(3):
        own = series[:, runs == run]
        events = _blocks_as_events(labels[runs == run])
        design = condition_design(events, own.shape[1], config)
        parts.append(GlmRun(series=ArraySeries(own, voxels), design=design))
        volume = np.zeros((mask.size, own.shape[1]))
        volume[voxels] = own
        scans.append(nibabel.Nifti1Image(volume.reshape(*grid.shape, -1), grid.affine))
        tables.append(
            pd.DataFrame(
                {
                    "onset": events.onset_s,
                    "duration": events.duration_s,
                    "trial_type": events.trial_type,
                }
            )
        )
    found = fit_glm(parts, {"a": "face - house"}, config, budget_bytes=1 << 20).maps["a"]
    image = nibabel.Nifti1Image(mask.reshape(grid.shape), grid.affine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FirstLevelModel(t_r=TR_S, mask_img=image).fit(scans, tables)
        maps = model.compute_contrast("face - house", output_type="all")
    for ours, theirs in ((found.stat(), "stat"), (found.effect, "effect_size")):
        reference = np.asarray(maps[theirs].dataobj).ravel()[voxels]
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)
    assert np.abs(found.stat()).max() > 5


@pytest.mark.parametrize("method", ["lsa", "lss"])
def test_categories_are_decoded_from_block_betas(folder: Path, method: str) -> None:
    series, voxels, _, labels, runs = _scan(folder)
    config = GlmConfig(t_r_s=TR_S)
    parts = [
        TrialRun(
            series=ArraySeries(series[:, runs == run], voxels),
            events=_blocks_as_events(labels[runs == run]),
        )
        for run in range(12)
    ]
    betas = trial_betas(parts, config, method=method)  # type: ignore[arg-type]
    design = betas.design()
    assert betas.values.shape == (530, 96)
    two = design.of_classes(["face", "house"])
    result = decode(two.samples(betas.values), two, MvpaConfig(scores=("accuracy",)))
    assert result.scores["accuracy"] >= 0.9
    eight = decode(design.samples(betas.values), design, MvpaConfig(scores=("accuracy",)))
    assert eight.scores["accuracy"] >= 0.35  # of 96 samples; chance 0.125


def test_a_real_searchlight_is_nilearns(folder: Path) -> None:
    series, voxels, grid, labels, runs = _scan(folder)
    cleaned = CleanedSeries(
        source=ArraySeries(series, voxels),
        config=CleanConfig(detrend=True, standardize="zscore_sample"),
        runs=runs,
    )
    design = design_of_volumes(labels, runs, delay_volumes=0).of_classes(["face", "house"])
    centres = voxels[::24]
    config = SearchlightConfig(
        radius_mm=9.0, centres_a_block=20, decode=MvpaConfig(scale="none", scores=("accuracy",))
    )
    found = searchlight(cleaned, grid, design, config, centres=centres).scores["accuracy"]
    size = int(np.prod(grid.shape))
    volume, mask, wanted = np.zeros((size, len(design))), np.zeros(size), np.zeros(size)
    volume[voxels] = design.samples(cleaned.read(voxels)).T
    mask[voxels], wanted[centres] = 1, 1
    image = [
        nibabel.Nifti1Image(part.reshape(*grid.shape, *part.shape[1:]), grid.affine)
        for part in (volume, mask, wanted)
    ]
    light = SearchLight(
        image[1],
        image[2],
        radius=9.0,
        estimator=SVC(kernel="linear"),
        scoring="accuracy",
        cv=LeaveOneGroupOut(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        light.fit(image[0], design.encoded(), design.runs)
    np.testing.assert_allclose(found, light.scores_.ravel()[centres], atol=1e-12)
    assert found.max() > 0.85
