"""Synthetic patterns for the tests of decoding."""

from __future__ import annotations

import numpy as np

from raypipe.fmri.mvpa import Design


def design_of(labels: np.ndarray, runs: np.ndarray, blocks: np.ndarray | None = None) -> Design:
    """One volume a sample; each a block of its own unless ``blocks`` are given."""
    n = len(labels)
    return Design(
        labels=labels,
        runs=runs,
        blocks=np.arange(n) if blocks is None else blocks,
        start=np.arange(n + 1),
        volumes=np.arange(n),
    )


def planted(
    n_classes: int, n_runs: int = 4, each: int = 5, n_voxels: int = 30, signal: float = 0.7
) -> tuple[np.ndarray, Design]:
    """(patterns (n, n_voxels), design) of classes with patterns of their own in white noise."""
    rng = np.random.default_rng(n_classes + n_voxels)
    names = np.array(["cat", "face", "house", "shoe"])[:n_classes]
    labels = np.tile(np.repeat(names, each), n_runs)
    runs = np.repeat(np.arange(n_runs), n_classes * each)
    means = rng.normal(size=(n_classes, n_voxels)) * signal
    noise = rng.normal(size=(len(labels), n_voxels))
    return means[np.searchsorted(names, labels)] + noise + 100, design_of(labels, runs)


def planted_target(
    n_runs: int = 4, each: int = 12, n_voxels: int = 30
) -> tuple[np.ndarray, Design]:
    """(patterns, design) of a number that some voxels follow."""
    rng = np.random.default_rng(n_voxels)
    target = rng.normal(size=n_runs * each)
    weights = rng.normal(size=n_voxels) * (rng.random(n_voxels) > 0.5)
    noise = rng.normal(size=(len(target), n_voxels)) * 2
    return target[:, None] * weights + noise, design_of(target, np.repeat(np.arange(n_runs), each))
