"""Preprocessing: to the bit what torchvision, timm and open_clip do with the same picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.models import ResNet18_Weights

from raypipe.backbone import Preprocess, resolve
from raypipe.backbone.preprocess import IMAGENET_MEAN, IMAGENET_STD
from raypipe.errors import BadImage, ConfigError

SIZES = [(425, 425), (480, 640), (333, 250), (97, 301), (300, 97), (224, 224), (40, 60)]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth structure with noise on top: resampling and its antialiasing both matter."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((width, height))
    return np.clip(np.asarray(coarse) + rng.integers(-30, 30, (height, width, 3)), 0, 255).astype(
        np.uint8
    )


def ours(preprocess: Preprocess, pixels: np.ndarray) -> torch.Tensor:
    return preprocess.device(torch.from_numpy(preprocess.host(pixels).copy())[None])[0]


@pytest.mark.parametrize("size", SIZES)
def test_resnet_is_torchvisions_own_transform(size: tuple[int, int]) -> None:
    """Its transform of these very weights, built from torchvision's pieces on PIL images."""
    published = ResNet18_Weights.IMAGENET1K_V1.transforms()
    reference = transforms.Compose(
        [
            transforms.Resize(published.resize_size, interpolation=published.interpolation),
            transforms.CenterCrop(published.crop_size),
            transforms.ToTensor(),
            transforms.Normalize(published.mean, published.std),
        ]
    )
    pixels = picture(*size)
    spec = resolve("resnet18")
    assert torch.equal(ours(spec.preprocess, pixels), reference(Image.fromarray(pixels)))
    assert torch.equal(ours(spec.preprocess, pixels), published(Image.fromarray(pixels)))


@pytest.mark.parametrize("size", SIZES)
def test_clip_is_open_clips_own_transform(size: tuple[int, int]) -> None:
    from open_clip import get_pretrained_cfg, image_transform

    cfg = get_pretrained_cfg("ViT-L-14", "openai")
    reference = image_transform(
        224, is_train=False, mean=cfg["mean"], std=cfg["std"], interpolation=cfg["interpolation"]
    )
    pixels = picture(*size)
    assert torch.equal(ours(resolve("clip").preprocess, pixels), reference(Image.fromarray(pixels)))


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        "resnet10t",
        "vit_base_patch16_siglip_224",
        "convnext_atto",
    ],
)
def test_timm_is_timms_own_transform(name: str) -> None:
    """Bicubic and bilinear, crop 0.9 and less, and one that squashes the aspect ratio."""
    import timm
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config(pretrained_cfg=timm.models.get_pretrained_cfg(name).to_dict())
    reference = create_transform(**config)
    for size in SIZES:
        pixels = picture(*size)
        assert torch.equal(
            ours(resolve(f"timm:{name}").preprocess, pixels), reference(Image.fromarray(pixels))
        )


def test_dinov2_pads_right_and_below_after_normalising() -> None:
    pixels = picture(425, 425)
    tensor = ours(resolve("dinov2").preprocess, pixels)
    normalised = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    )
    assert tensor.shape == (3, 434, 434)
    assert torch.equal(tensor[:, :425, :425], normalised(Image.fromarray(pixels)))
    assert not tensor[:, 425:].any()
    assert not tensor[:, :, 425:].any()


def test_image_size_comes_before_anything() -> None:
    spec = resolve("dinov2_q", image_size=224)
    assert spec.preprocess.output_size(425, 425) == (224, 224)
    assert resolve("dinov2_q", image_size=230).preprocess.output_size(425, 425) == (238, 238)
    pixels = picture(300, 400)
    want = transforms.Compose(
        [
            transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
        ]
    )(Image.fromarray(pixels))
    np.testing.assert_array_equal(spec.preprocess.host(pixels), np.asarray(want))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    resize=st.one_of(st.none(), st.integers(1, 60)),
    less=st.one_of(st.none(), st.integers(0, 20)),
    squash=st.booleans(),
    pad=st.one_of(st.none(), st.integers(1, 17)),
)
def test_sizes_are_foretold(
    height: int, width: int, resize: int | None, less: int | None, squash: bool, pad: int | None
) -> None:
    crop = None if resize is None or less is None else max(1, resize - less)
    preprocess = Preprocess(resize=resize, crop=crop, squash=squash, pad_multiple=pad)
    pixels = picture(height, width)
    host = preprocess.host(pixels)
    assert host.shape == (*preprocess.host_size(height, width), 3)
    out = preprocess.device(torch.from_numpy(host.copy())[None])
    assert out.shape == (1, 3, *preprocess.output_size(height, width))
    assert out.dtype == torch.float32
    if pad:
        assert out.shape[2] % pad == out.shape[3] % pad == 0


def test_nothing_to_do_copies_nothing() -> None:
    pixels = picture(30, 40)
    assert Preprocess().host(pixels) is pixels


def test_device_leaves_the_batch_alone_and_works_in_and_out_of_inference_mode() -> None:
    batch = torch.from_numpy(picture(8, 8).copy())[None]
    before = batch.clone()
    preprocess = Preprocess(mean=(0.1, 0.2, 0.3), std=(0.9, 0.8, 0.7))
    with torch.inference_mode():
        first = preprocess.device(batch)
    scale = torch.ones(1, requires_grad=True)
    (preprocess.device(batch) * scale).sum().backward()
    assert torch.equal(batch, before)
    assert torch.equal(first, preprocess.device(batch))


def test_a_sliver_is_a_bad_image() -> None:
    with pytest.raises(BadImage, match="too narrow"):
        resolve("clip").preprocess.host(np.zeros((2, 400, 3), np.uint8))


def test_wrong_pixels_are_a_programming_error() -> None:
    for pixels in (
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
    ):
        with pytest.raises(TypeError, match="uint8"):
            Preprocess().host(pixels)
    with pytest.raises(TypeError, match="uint8"):
        Preprocess().device(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize(
    "wrong",
    [
        {"resize": 0},
        {"resize": -1},
        {"crop": 224},
        {"resize": 100, "crop": 224},
        {"pad_multiple": 0},
        {"interpolation": "lanczos"},
        {"std": (1.0, 0.0, 1.0)},
        {"mean": (1.0,)},
        {"resize": 10**9},
    ],
)
def test_options_check_themselves(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        Preprocess(**wrong)
    assert "\n" not in str(caught.value)
