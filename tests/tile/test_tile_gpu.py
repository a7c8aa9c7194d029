"""On CUDA: tiles agree with the whole image within rounding, TF32 off; the rest is the CPU's tests."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tile_models import Strided, UNet, dilated, fitted, seeded
from torch import nn

import raypipe
from raypipe.tile import measure
from raypipe.tile.precision import exact_float32

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA"),
]
MODELS = {
    "unet": (lambda: UNet(3, width=8, classes=3), 4),
    "bilinear": (lambda: UNet(3, width=8, up="bilinear"), 4),
    "fitted": (lambda: fitted(width=8, depth=3), 4),
    "dilated": (dilated, 1),
    "strided": (lambda: Strided(3), 3),
}


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def whole(model: nn.Module, image: np.ndarray, align: int) -> np.ndarray:
    """(channels, *space) of an image (*space), reflected to a multiple of ``align``."""
    x = np.pad(image, [(0, -n % align) for n in image.shape], mode="reflect")[None, None]
    cuda = torch.device("cuda")
    with torch.inference_mode(), exact_float32(cuda):
        out = model(torch.from_numpy(x).to(cuda))[0].cpu().numpy()
    return out[(slice(None), *(slice(0, n) for n in image.shape))]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tf32", [False, True])
def test_tiles_agree_with_the_whole_image(name: str, tf32: bool) -> None:
    """Whatever the process has set: with TF32 they would differ by some 1e-3."""
    make, align = MODELS[name]
    model, image = seeded(make).cuda(), noise(301, 277)
    before = torch.backends.fp32_precision
    torch.backends.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        got = raypipe.process_large_image(image, model, 96, batch=3, device="cuda")
        assert torch.backends.fp32_precision == ("tf32" if tf32 else "ieee")
    finally:
        torch.backends.fp32_precision = before
    wanted = whole(model, image, align)
    wanted = wanted[0] if len(wanted) == 1 else wanted
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.ptp(wanted))


def test_volumes_agree() -> None:
    model, volume = seeded(lambda: UNet(2, width=4, dims=3)).cuda(), noise(21, 40, 45)
    got = raypipe.process_large_image(volume, model, 12, device="cuda")
    wanted = whole(model, volume, 2)[0]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.ptp(wanted))


@pytest.mark.parametrize("name", MODELS)
def test_how_far_a_model_looks_is_the_same_on_a_gpu(name: str) -> None:
    model = seeded(MODELS[name][0])
    here, there = measure(model, 1), measure(copy.deepcopy(model).cuda(), 1)
    assert (here.halo, here.align, here.exact) == (there.halo, there.align, there.exact)


def test_a_gpu_that_is_full_halves_the_batch() -> None:
    """The first batch asks for more than any GPU has; what it took is free for the next."""

    class Greedy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 1:
                x = x + torch.empty(1 << 44, dtype=torch.uint8, device=x.device)[0]
            return x + 1

    image = noise(128, 128)
    got = raypipe.process_large_image(
        image, Greedy(), 32, dims=2, halo=0, align=1, batch=4, device="cuda"
    )
    np.testing.assert_array_equal(got, image + 1)
