"""Real fMRI (Haxby 2001, half a slice): what must be decoded is, and permuted labels are at chance."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import nibabel
import numpy as np
import pytest

from raypipe.fmri.clean import CleanConfig, clean
from raypipe.fmri.masks import Grid, mask_voxels
from raypipe.fmri.mvpa import Design, EstimatorConfig, MvpaConfig, decode, design_of_volumes


@pytest.fixture
def haxby(real_data: Path) -> tuple[np.ndarray, Design]:
    """(patterns (864, 530), design): each run detrended and z-scored, a sample a volume, no delay."""
    folder = real_data / "haxby"
    if not folder.is_dir():
        pytest.skip(f"real fMRI is not at {folder}; set RAYPIPE_REAL_DATA")
    return _prepared(folder)


@cache
def _prepared(folder: Path) -> tuple[np.ndarray, Design]:
    labels, runs = np.loadtxt(folder / "attributes_literal.txt", dtype=str, unpack=True)
    image = nibabel.load(folder / "bold.nii.gz")
    voxels = mask_voxels(folder / "mask.nii.gz", Grid.of(image))
    series = np.asarray(image.dataobj).reshape(-1, image.shape[-1])[voxels]
    config = CleanConfig(detrend=True, standardize="zscore_sample")
    cleaned = clean(series, config, runs=runs.astype(int))
    design = design_of_volumes(labels, runs.astype(int), delay_volumes=0)
    return design.samples(cleaned.values), design


def _of(haxby: tuple[np.ndarray, Design], *classes: str) -> tuple[np.ndarray, Design]:
    patterns, design = haxby
    return patterns[np.isin(design.labels, classes)], design.of_classes(classes)


def test_eight_categories_are_decoded_from_single_volumes(
    haxby: tuple[np.ndarray, Design],
) -> None:
    patterns, design = haxby
    assert patterns.shape == (864, 530)
    assert len(design.classes) == 8
    result = decode(patterns, design, MvpaConfig(scores=("accuracy",)))
    assert len(result.folds["accuracy"]) == 12
    assert result.scores["accuracy"] >= 0.58  # chance 0.125


def test_faces_and_houses_are_told_apart(haxby: tuple[np.ndarray, Design]) -> None:
    result = decode(*_of(haxby, "face", "house"), MvpaConfig())
    assert result.scores["accuracy"] >= 0.97
    assert result.scores["roc_auc"] >= 0.99


@pytest.mark.parametrize("exchange", ["block", "sample"])
def test_labels_permuted_within_runs_are_at_chance(
    haxby: tuple[np.ndarray, Design], exchange: str
) -> None:
    config = MvpaConfig(n_permutations=100, exchange=exchange, scores=("accuracy",))  # type: ignore[arg-type]
    result = decode(*_of(haxby, "face", "house"), config)
    # Whole blocks are exchanged: one permutation's accuracy spreads by 0.1, their mean by 0.01.
    assert abs(result.null["accuracy"].mean() - 0.5) < 0.03
    assert result.p["accuracy"] == 1 / 101
    ridge = MvpaConfig(
        model=EstimatorConfig(estimator="ridge_classifier", alpha=100.0),
        n_permutations=200,
        exchange=exchange,  # type: ignore[arg-type]
        scores=("accuracy",),
    )
    eight = decode(*haxby, ridge)
    assert abs(eight.null["accuracy"].mean() - 0.125) < 0.01
    assert eight.null["accuracy"].max() < 0.3 < eight.scores["accuracy"]
    assert eight.p["accuracy"] == 1 / 201
