"""Tiles against the whole image: bit by bit on the CPU in float32, for models that can be tiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tile_models import Normed, Strided, UNet, dilated, fitted, seeded
from torch import nn

import raypipe
from raypipe.errors import InputError


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def whole(model: nn.Module, image: np.ndarray, align: int, dims: int = 2) -> np.ndarray:
    """(channels, *space) of the image (channels, *space), reflected to a multiple of ``align``."""
    size = image.shape[1:]
    padded = np.pad(image, [(0, 0), *((0, -n % align) for n in size)], mode="reflect")
    with torch.inference_mode():
        out = model(torch.from_numpy(padded)[None])[0].numpy()
    return out[(slice(None), *(slice(0, n) for n in size))]


@pytest.mark.parametrize(
    ("make", "align", "tile", "shape"),
    [
        (lambda: UNet(2, width=8), 2, 144, (301, 277)),
        (lambda: UNet(3, width=8, classes=3), 4, 160, (301, 377)),
        (lambda: UNet(3, width=8, up="bilinear"), 4, 160, (301, 350)),
        (lambda: fitted(width=8, depth=3), 4, 160, (301, 350)),
        (dilated, 1, 128, (221, 233)),
        (lambda: Strided(3), 3, 216, (430, 421)),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_tiles_equal_the_whole_image_bit_by_bit(make, align, tile, shape, batch: int) -> None:
    """Windows so large that torch takes the same kernels for them as for the image (docs/tiles.md)."""
    model, image = seeded(make), noise(*shape)
    got = raypipe.process_large_image(image, model, tile, batch=batch)
    wanted = whole(model, image[None], align)
    assert np.array_equal(got, wanted[0] if len(wanted) == 1 else wanted)


def test_a_halo_that_is_too_small_shows() -> None:
    """So the tests above can fail."""
    model, image = seeded(lambda: UNet(3, width=8)), noise(200, 200)
    got = raypipe.process_large_image(image, model, 64, halo=4, align=4)
    assert np.abs(got - whole(model, image[None], 4)).max() > 1e-5


def test_an_image_smaller_than_the_alignment() -> None:
    model, image = seeded(lambda: UNet(3)), noise(3, 1)
    got = raypipe.process_large_image(image, model, 64)
    padded = np.pad(np.pad(image, ((0, 1), (0, 0)), mode="reflect"), ((0, 0), (0, 3)), mode="edge")
    assert np.array_equal(got, whole(model, padded[None], 4)[0, :3, :1])


def test_frames_channels_and_volumes() -> None:
    planes = noise(3, 70, 61, 2)
    model = seeded(lambda: UNet(2, c_in=2))
    got = raypipe.process_large_image(planes, model, 32, axes="FYXC", batch=2)
    for frame, image in zip(got, planes, strict=True):
        wanted = whole(model, image.transpose(2, 0, 1), 2)[0]
        np.testing.assert_allclose(frame, wanted, rtol=0, atol=1e-6)
    volume, deep = noise(21, 40, 45), seeded(lambda: UNet(2, width=2, dims=3, classes=2))
    got = raypipe.process_large_image(volume, deep, 12)
    np.testing.assert_allclose(got, whole(deep, volume[None], 2), rtol=0, atol=1e-6)


def test_prepare_and_after_work_pixel_by_pixel() -> None:
    model = seeded(lambda: UNet(2, classes=3))
    image = (noise(90, 80) * 1000 + 5000).astype(np.uint16)

    def prepare(pixels: np.ndarray) -> np.ndarray:
        return (pixels.astype(np.float32) - 5000) / 1000

    got = raypipe.process_large_image(
        image,
        model,
        32,
        prepare=prepare,
        after=lambda out: out.argmax(1, keepdim=True).to(torch.uint8),
    )
    wanted = whole(model, prepare(image)[None], 2).argmax(0)
    assert got.dtype == np.uint8 and np.array_equal(got, wanted)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"prepare": lambda x: x / x.max()}, "prepare"),
        ({"prepare": lambda x: x - x.mean(-1, keepdims=True)}, "prepare"),
        ({"prepare": lambda x: x[..., ::-1].copy()}, "prepare"),
        ({"after": lambda out: out / out.amax((2, 3), keepdim=True)}, "after"),
        ({"after": lambda out: nn.functional.avg_pool2d(out, 3, 1, 1)}, "after"),
    ],
)
def test_what_is_not_pixel_by_pixel_is_refused(options: dict[str, object], name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is not pixel by pixel"):
        raypipe.process_large_image(noise(90, 80), nn.Conv2d(1, 1, 1), 32, **options)


def test_what_changes_its_argument_is_still_pixel_by_pixel() -> None:
    def prepare(pixels: np.ndarray) -> np.ndarray:
        np.exp(pixels, out=pixels)
        return pixels

    model, image = nn.Conv2d(1, 1, 1).eval(), noise(37, 41)
    got = raypipe.process_large_image(
        image.copy(), model, 32, prepare=prepare, after=torch.Tensor.sigmoid_
    )
    with torch.inference_mode():
        wanted = model(torch.from_numpy(np.exp(image))[None, None]).sigmoid()[0, 0].numpy()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("blend", [None, "linear"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_models_of_other_precisions(dtype: torch.dtype, blend: str | None) -> None:
    """Pointwise, so that blending is exact up to rounding too; 0.1 is another number in each."""
    model, image = nn.Conv2d(1, 1, 1, bias=False).to(dtype).eval(), noise(90, 70)
    nn.init.constant_(model.weight, 0.1)
    options = {"blend": blend, "overlap": 8, "halo": 0, "align": 1}
    if dtype == torch.bfloat16:
        with pytest.raises(InputError, match=r"bfloat16.*after=torch.Tensor.float"):
            raypipe.process_large_image(image, model, 32, **options)
        options["after"] = torch.Tensor.float
    got = raypipe.process_large_image(image, model, 32, **options)
    with torch.inference_mode():
        wanted = model(torch.from_numpy(image)[None, None].to(dtype))[0, 0].double().numpy()
    assert got.dtype == (
        np.float32 if dtype == torch.bfloat16 else wanted.astype(str(dtype)[6:]).dtype
    )
    eps = 1e-3 if dtype == torch.float16 else 1e-6
    atol = 0 if blend is None else eps * np.abs(wanted).max()
    np.testing.assert_allclose(got.astype(np.float64), wanted, rtol=0, atol=atol)


def test_a_float64_network_is_measured() -> None:
    model, image = seeded(lambda: UNet(2, width=4)).double(), noise(70, 61)
    got = raypipe.process_large_image(image, model, 32)
    with torch.inference_mode():
        padded = np.pad(image.astype(np.float64), ((0, 0), (0, 1)), mode="reflect")
        wanted = model(torch.from_numpy(padded)[None, None])[0, 0, :, :61].numpy()
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("blend", ["linear", "gaussian"])
def test_a_model_that_cannot_be_tiled_is_refused_and_can_be_blended(blend: str) -> None:
    model, image = seeded(lambda: Normed(nn.InstanceNorm2d(4))), noise(150, 170)
    with pytest.raises(InputError, match=r"norm \(InstanceNorm2d\).*blend='gaussian'"):
        raypipe.process_large_image(image, model, 64)
    got = raypipe.process_large_image(image, model, 64, blend=blend, overlap=16)
    wanted = by_loop(model, image, 64, 16, blend)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
    assert not np.allclose(got, whole(model, image[None], 1)[0], atol=1e-3)


def test_a_network_that_refuses_odd_sizes_can_be_blended() -> None:
    """Its alignment is found by what it takes; where one window is the image, blending is exact."""
    model, image = seeded(lambda: fitted(width=4, depth=4)), noise(61, 70)
    got = raypipe.process_large_image(image, model, 72, blend="linear", overlap=16)
    np.testing.assert_allclose(got, whole(model, image[None], 8)[0], rtol=0, atol=1e-6)


def by_loop(model: nn.Module, image: np.ndarray, tile: int, overlap: int, kind: str) -> np.ndarray:
    """Blending as one would write it down: sum of weighted windows over sum of weights."""
    height, width = image.shape
    total, weights = np.zeros((2, height, width))
    side = tile + 2 * overlap
    for y in range(0, height, tile):
        for x in range(0, width, tile):
            top, left = (
                min(max(y - overlap, 0), height - side),
                min(max(x - overlap, 0), width - side),
            )
            out = whole(model, image[None, top : top + side, left : left + side], 1)[0]
            for i in range(max(0, y - overlap), min(height, y + tile + overlap)):
                for j in range(max(0, x - overlap), min(width, x + tile + overlap)):
                    w = 1.0
                    for at in (i + 0.5 - y + overlap, j + 0.5 - x + overlap):
                        if kind == "gaussian":
                            w *= np.exp(-0.5 * ((at - side / 2) / (side / 8)) ** 2)
                        else:
                            w *= min(1.0, at / (2 * overlap), (side - at) / (2 * overlap))
                    total[i, j] += w * out[i - top, j - left]
                    weights[i, j] += w
    return total / weights


def test_blending_equals_the_whole_where_windows_agree(tmp_path: Path) -> None:
    """A pointwise model: every window says the same, so the weights must sum to one everywhere."""
    model, image = nn.Conv2d(1, 2, 1).eval(), noise(333, 219)
    for blend in ("linear", "gaussian"):
        got = raypipe.process_large_image(image, model, 40, blend=blend, overlap=13)
        np.testing.assert_allclose(got, whole(model, image[None], 1), rtol=0, atol=1e-6)
