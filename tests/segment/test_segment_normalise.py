"""The range that pixels are scaled by is that of all training pixels, whatever few of them say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from segment_pictures import pages, save

from raypipe.errors import ConfigError
from raypipe.segment.normalise import Normalisation, measure
from raypipe.segment.readers import Readers


@pytest.mark.parametrize("kind", ["percentile", "minmax"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_normalisation_is_that_of_all_training_pixels(
    tmp_path: Path, kind: Any, dtype: Any
) -> None:
    rng = np.random.default_rng(1)
    parts, listed = [], []
    for number, cols in enumerate([(0, 40), (10, 25)]):
        pixels = (rng.gamma(2, 20, (31, 40)) * 2).astype(dtype)
        save(tmp_path / f"{number}.tif", pixels)
        parts.append(pixels[:, slice(*cols)].ravel())
        listed.append(
            replace(pages(1, 1)[0], image=tmp_path / f"{number}.tif", rows=(0, 31), cols=cols)
        )
    found = measure(listed, kind, low=1.0, high=99.0, readers=Readers())
    every = np.concatenate(parts).astype(np.float64)
    ends = (0, 100) if kind == "minmax" else (1, 99)
    want = [np.percentile(every, q, method="lower") for q in ends]
    step = np.ptp(every) / 2**20  # of a float's histogram
    np.testing.assert_allclose([found.low[0], found.high[0]], want, atol=1.01 * step, rtol=0)
    x = found.apply(np.array([[[want[0], want[1]]]], np.float64))
    np.testing.assert_allclose(x, [[[0, 1]]], atol=1e-4)


@pytest.mark.parametrize("hot", [1e5, 1e9, -1e9, 1e15])
def test_a_hot_pixel_does_not_move_the_percentiles(tmp_path: Path, hot: float) -> None:
    """What percentiles are for; a dead pixel as well, and the other channel has neither."""
    pixels = np.random.default_rng(1).gamma(2, 20, (90, 80, 2))
    pixels[30, 40, 0] = hot
    how = {"photometric": "minisblack", "planarconfig": "contig"}
    tifffile.imwrite(tmp_path / "0.tif", pixels, **how)
    one = replace(pages(1, 1)[0], image=tmp_path / "0.tif", rows=(0, 90), cols=(0, 80), channels=2)
    found = measure([one], "percentile", low=1.0, high=99.0, readers=Readers())
    for channel in range(2):
        wanted = [np.percentile(pixels[..., channel], q, method="lower") for q in (1, 99)]
        got = [found.low[channel], found.high[channel]]
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-3 * (wanted[1] - wanted[0]))


def test_a_constant_image_has_no_range() -> None:
    with pytest.raises(ConfigError, match="low must be below high"):
        Normalisation(kind="minmax", low=(3.0,), high=(3.0,))
