"""What comes of correlations and of predictions, without a run: the summary, and the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raypipe.encoding.predictions import PredictionFile
from raypipe.encoding.score import Scores, summarise


def test_dead_vertices_count_as_zero_against_the_ceiling() -> None:
    r = {"lh": np.array([0.5, np.nan, np.nan]), "rh": np.array([0.3, np.nan, 0.2])}
    nc = {"lh": np.array([0.25, 0.25, np.nan]), "rh": np.array([0.36, 0.16, 0.0])}
    summary = summarise(Scores(n_images=9, r=r, nc=nc))
    assert summary["n_explainable"] == 4 and summary["n_counted_zero"] == 2
    ceilings = 0.5 + 0.5 + 0.6 + 0.4
    assert summary["recovered"] == pytest.approx((0.5 + 0.3) / ceilings)
    assert summary["mean_r_explainable"] == pytest.approx(0.8 / 4)
    assert summary["mean_r"] == pytest.approx(1 / 3) and summary["n_scored"] == 3
    assert summary["median_r_over_ceiling"] == pytest.approx(0.25)  # of 1, 0, 0.5, 0
    unknown = {hemi: np.full(3, np.nan) for hemi in r}
    assert summarise(Scores(n_images=9, r=r, nc=unknown))["recovered"] is None


def test_a_prediction_that_breaks_off_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lh.npy"
    with pytest.raises(RuntimeError), PredictionFile(path, 3, 4) as file:
        file.write(1, np.ones(4, np.float32))
        raise RuntimeError("broken off")
    assert list(path.parent.iterdir()) == []
    with PredictionFile(path, 2, 4) as file:
        file.write(1, np.full(4, 2, np.float32))
        file.write(0, np.full(4, 1, np.float32))
    np.testing.assert_array_equal(np.load(path), [[1] * 4, [2] * 4])
