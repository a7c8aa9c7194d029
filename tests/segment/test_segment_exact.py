"""The default U-Net, and a network of the library, tile by tile against the whole image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from raypipe import process_large_image
from raypipe.segment.model import LibraryConfig, UNetConfig, build_model
from raypipe.tile import TileGrid, measure


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(4).standard_normal(shape).astype(np.float32)


def moved_norms(model: nn.Module) -> nn.Module:
    """In eval mode, with statistics as training leaves them: not those of a new norm."""
    torch.manual_seed(0)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, std=0.1)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
    return model.eval()


def whole(model: nn.Module, pixels: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(pixels)[None, None])[0, 0].numpy()


@pytest.mark.slow
def test_the_default_network_bit_by_bit() -> None:
    """Tiles of 64 pixels, whose windows of 64 + 2 halos are cut out of the image at several places."""
    # How far it looks is the same at any width, and is measured quicker on a narrow one.
    field = measure(build_model(UNetConfig(width=2)).eval(), 1)
    pixels, tile = image(64, 400), 64
    grid = TileGrid.of(pixels.shape, (tile, tile), field.halo, field.align)
    windows = {one.read[1].start for one in grid}
    assert len(grid) >= 4 and grid.window[1] < pixels.shape[1] and len(windows) >= 3
    model = moved_norms(build_model(UNetConfig(), seed=1))
    got = process_large_image(pixels, model, tile, halo=field.halo, align=field.align)
    wanted = whole(model, pixels)
    assert np.ptp(wanted) > 0.1, "a constant would be equal anywhere"
    assert np.array_equal(got, wanted)


@pytest.mark.slow
def test_a_network_of_the_library() -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="the smp extra is not installed")
    spec = LibraryConfig(architecture="Unet", encoder="resnet18", in_channels=1, classes=1)
    model = moved_norms(build_model(spec, seed=1))
    # What `measure` finds, which takes it half a minute: a radius of 311 pixels.
    tile, halo, align = 64, (320, 320), (32, 32)
    pixels = image(64, 14 * tile)
    grid = TileGrid.of(pixels.shape, (tile, tile), halo, align)
    assert len(grid) >= 4 and grid.window[1] < pixels.shape[1]
    got = process_large_image(pixels, model, tile, halo=halo, align=align)
    wanted = whole(model, pixels)
    assert np.ptp(wanted) > 0.1
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.ptp(wanted))
