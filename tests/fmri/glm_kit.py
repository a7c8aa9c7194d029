"""Synthetic runs for the tests of models: series with responses, drift and noise that remembers."""

from __future__ import annotations

import numpy as np
import pandas as pd
from nibabel import Nifti1Image
from nilearn.glm.first_level import make_first_level_design_matrix

from raypipe.read.events import Events

TR_S = 2.0
SHAPE = (3, 4, 2)


def some_events(seed: int, n: int = 12, every_s: float = 12.0, kinds: int = 3) -> Events:
    """n events of some kinds, not on the grid of volumes."""
    rng = np.random.default_rng(seed)
    onset = 4.0 + np.arange(n) * every_s + rng.uniform(0, 4, n)
    kind = np.array(["face", "house", "shoe"])[rng.permutation(np.arange(n) % kinds)]
    return Events(onset_s=onset, duration_s=np.full(n, 2.0), trial_type=kind)


def frame_of(events: Events) -> pd.DataFrame:
    """The same for nilearn."""
    return pd.DataFrame(
        {"onset": events.onset_s, "duration": events.duration_s, "trial_type": events.trial_type}
    )


def series_of(events: Events, seed: int, n_volumes: int = 90) -> np.ndarray:
    """(24, n_volumes) float32: responses to the conditions on a mean of about 800, AR(1) noise."""
    rng = np.random.default_rng(seed)
    times = np.arange(n_volumes) * TR_S
    design = make_first_level_design_matrix(times, frame_of(events)).to_numpy()
    n = int(np.prod(SHAPE))
    rho = rng.uniform(-0.2, 0.7, n)[:, None]
    noise = rng.normal(size=(n, n_volumes))
    for t in range(1, n_volumes):
        noise[:, t] += rho[:, 0] * noise[:, t - 1]
    signal = rng.normal(size=(n, design.shape[1])) @ design.T
    mean = rng.uniform(500, 1100, n)[:, None]
    return (mean + 8 * signal + 5 * noise).astype(np.float32)


def images(series: np.ndarray) -> tuple[Nifti1Image, Nifti1Image]:
    """(scan in float64 so that nilearn computes in it, mask of all voxels)."""
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    scan = Nifti1Image(series.reshape(*SHAPE, -1).astype(np.float64), affine)
    return scan, Nifti1Image(np.ones(SHAPE, np.uint8), affine)
