"""Tokens against independent constructions: timm's own forward, a plain slice. CLIP is test_clip's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from backbone_kit import CPU, TINY, alive, normalised, pixels, run
from torch import nn

from raypipe.backbone import BackboneSpec, LayerSpec, Preprocess, resolve
from raypipe.backbone.libraries import build
from raypipe.backbone.model import Backbone, check_device, load, shapes
from raypipe.errors import ConfigError, DeviceUnavailable, InputError, UnknownName


@pytest.fixture(scope="module")
def dinov2() -> nn.Module:
    """One full-size model for the tests that only read it."""
    return alive(build(resolve("dinov2")))


@torch.no_grad()
def test_dinov2_is_timms_forward_features(dinov2: nn.Module) -> None:
    spec, batch = resolve("dinov2"), pixels(1, 425, 425)
    tokens = run(spec, dinov2, batch)["last"]
    assert tokens.shape == (1, 962, 768)
    want: Any = dinov2
    torch.testing.assert_close(
        tokens, want.forward_features(normalised(spec, batch)), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_dinov2_block_is_get_intermediate_layers(dinov2: nn.Module) -> None:
    spec, batch, model = resolve("dinov2", enc_layer=4), pixels(1, 84, 112), dinov2
    ((patches, prefix),) = model.get_intermediate_layers(  # type: ignore[operator]
        normalised(spec, batch), n=[4], norm=True, return_prefix_tokens=True
    )
    tokens = run(spec, dinov2, batch)["4"]
    torch.testing.assert_close(tokens, torch.cat([prefix, patches], 1), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("block", [-1, 2])
def test_qkv_is_a_plain_slice_of_the_projection(dinov2: nn.Module, block: int) -> None:
    batch, model = pixels(2, 70, 56), dinov2
    specs = {part: resolve(f"dinov2_{part}", enc_layer=block) for part in "qkv"}
    model_any: Any = model
    x = model_any.patch_embed(normalised(specs["q"], batch))
    x = model_any.norm_pre(model_any._pos_embed(x))
    stop = block % 12
    for layer in model_any.blocks[:stop]:
        x = layer(x)
    attention = model_any.blocks[stop].attn
    qkv = nn.functional.linear(
        model_any.blocks[stop].norm1(x), attention.qkv.weight, attention.qkv.bias
    )
    for part, (start, spec) in zip(
        "qkv", zip((0, 768, 1536), specs.values(), strict=True), strict=True
    ):
        (tokens,) = run(spec, dinov2, batch).values()
        assert tokens.shape == (2, 1 + 5 * 4, 768), part
        torch.testing.assert_close(tokens, qkv[..., start : start + 768], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_queries_are_those_that_attention_multiplies(
    dinov2: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen from inside: what reaches scaled_dot_product_attention as its query, heads merged."""
    seen: list[torch.Tensor] = []
    attend = nn.functional.scaled_dot_product_attention

    def note(q: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        seen.append(q)
        return attend(q, *rest, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", note)
    (tokens,) = run(resolve("dinov2_q"), dinov2, pixels(1, 56, 56)).values()
    merged = seen[11].transpose(1, 2).reshape(1, 17, 768)
    torch.testing.assert_close(tokens, merged, rtol=0, atol=0)


@torch.no_grad()
def test_resnet_map_is_tokens_row_by_row() -> None:
    """A ReLU in place follows each block: what was taken must be what the block put out."""
    spec = resolve("resnet18", layers=["layer4", "layer1.0.bn2", "layer2"])
    model: Any = alive(build(spec))
    batch = pixels(2, 64, 96)
    taken = run(spec, model, batch)
    taken_again = Backbone(spec, model, device=CPU)
    first, later = taken_again(batch), taken_again(batch)
    x = model.maxpool(model.relu(model.bn1(model.conv1(normalised(spec, batch)))))
    block = model.layer1[0]
    bn2 = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
    layer2 = model.layer2(model.layer1(x))
    layer4 = model.layer4(model.layer3(layer2))
    for key, want in (("layer1.0.bn2", bn2), ("layer2", layer2), ("layer4", layer4)):
        tokens = want.permute(0, 2, 3, 1).reshape(2, -1, want.shape[1])
        for outcome in (taken, first, later):
            torch.testing.assert_close(outcome[key], tokens, rtol=1e-5, atol=1e-5)
            assert outcome[key].is_contiguous()


@torch.no_grad()
@pytest.mark.parametrize("name", [TINY, "timm:resnet10t", "timm:test_convnext", "timm:test_vit3"])
def test_timm_default_is_forward_features(name: str) -> None:
    spec = resolve(name)
    model: Any = alive(build(spec))
    side = spec.preprocess.crop or 0
    batch = pixels(2, side, side)
    want = model.forward_features(normalised(spec, batch))
    want = want.flatten(2).transpose(1, 2) if want.ndim == 4 else want
    (tokens,) = run(spec, model, batch).values()
    torch.testing.assert_close(tokens, want, rtol=1e-5, atol=1e-5)
    assert shapes(spec, (9, 9))["features"] == tuple(tokens.shape[1:])


@torch.no_grad()
def test_forward_stops_once_all_is_taken() -> None:
    spec = resolve(TINY, layers=["blocks.1", "blocks.3.attn.qkv:v"])
    model: Any = build(spec)
    ran: list[int] = []
    for k, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, k=k: ran.append(k))
    backbone = Backbone(spec, model, device=CPU)
    batch = pixels(1, 224, 224)
    first = backbone(batch)
    assert ran == list(range(12))  # the first proves that each layer runs once
    ran.clear()
    second = backbone(batch)
    assert ran == [0, 1, 2]
    assert list(first) == list(second) == ["blocks.1", "blocks.3.attn.qkv-v"]
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)


@torch.no_grad()
def test_output_is_detached_float32_and_not_aliased() -> None:
    backbone = load(resolve(TINY, layers=["blocks.0", "blocks.0.attn.qkv:k"]), weights="random:0")
    outcome = backbone(pixels(1, 224, 224))
    for tokens in outcome.values():
        assert tokens.dtype == torch.float32
        assert not tokens.requires_grad
        assert tokens.is_contiguous()
        assert tokens.untyped_storage().nbytes() == tokens.nbytes  # no view of something larger


@torch.no_grad()
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.03), ("fp16", 0.005)])
def test_half_precision_is_near(precision: Any, tolerance: float) -> None:
    spec, batch = resolve(TINY), pixels(2, 224, 224)
    full = load(spec, weights="random:3")(batch)["features"]
    half = load(spec, weights="random:3", precision=precision)(batch)["features"]
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    assert (half - full).norm() / full.norm() < tolerance


@torch.no_grad()
def test_channels_last_changes_no_more_than_rounding() -> None:
    spec, batch = resolve("timm:resnet10t"), pixels(2, 176, 176)
    plain = load(spec, weights="random:3")(batch)["features"]
    last = load(spec, weights="random:3", channels_last=True)(batch)["features"]
    torch.testing.assert_close(last, plain, rtol=1e-3, atol=1e-3)
    assert last.is_contiguous()


@torch.no_grad()
def test_a_failed_forward_leaves_nothing_behind_and_the_next_one_works() -> None:
    """As after running out of memory, when the batch is halved and tried again."""
    backbone = load(resolve(TINY, layers=["blocks.1", "blocks.6"]), weights="random:0")
    batch = pixels(2, 224, 224)
    want = backbone(batch)
    for proven in (True, False):
        backbone._taps._proven = proven
        handle = backbone._model.blocks[4].register_forward_pre_hook(fail_without_memory)  # type: ignore
        with pytest.raises(torch.OutOfMemoryError):
            backbone(batch)
        assert not backbone._taps._taken
        handle.remove()
        torch.testing.assert_close(
            backbone(batch[:1])["blocks.6"], want["blocks.6"][:1], rtol=1e-5, atol=1e-5
        )


def fail_without_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


class Twice(nn.Module):
    """A model that calls one layer twice, another never, and one with odd outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.never, self.odd = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), Odd()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.odd(x)
        return self.shared(self.shared(x))


class Odd(nn.Module):
    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x, x]


@pytest.mark.parametrize(
    ("module", "says"),
    [
        ("shared", "runs 2 times"),
        ("never", "is never called"),
        ("odd", "puts out list"),
        ("nope", "nearest"),
    ],
)
def test_layers_that_are_not_one_thing(module: str, says: str) -> None:
    layer = LayerSpec(key="x", module=module, folder="x")
    spec = BackboneSpec(
        name="t", library="timm", arch="t", layers=(layer,), preprocess=Preprocess()
    )
    with pytest.raises(UnknownName if module == "nope" else InputError, match=says) as caught:
        run(spec, Twice(), pixels(1, 8, 8))
    assert "\n" not in str(caught.value)


def test_torch_attention_returns_a_pair() -> None:
    spec = resolve("open_clip:ViT-B-32", layers=["transformer.resblocks.1.attn"])
    assert shapes(spec, (9, 9)) == {"transformer.resblocks.1.attn": (50, 768)}


def test_what_comes_out_is_what_was_foretold() -> None:
    for name in ("timm:resnet10t", TINY, "open_clip:ViT-B-32", "resnet18"):
        spec = resolve(name)
        backbone = load(spec, weights="random:0")
        host = spec.preprocess.host(np.zeros((50, 70, 3), np.uint8))
        outcome = backbone(torch.from_numpy(host.copy())[None])
        assert {key: tuple(t.shape[1:]) for key, t in outcome.items()} == shapes(spec, (50, 70))


def test_devices_and_precision_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, error in (
        ("cuda", DeviceUnavailable),
        ("cuda:3", DeviceUnavailable),
        ("meta", DeviceUnavailable),
    ):
        with pytest.raises(error, match=device):
            check_device(device)
    with pytest.raises(ConfigError, match="gpu"):
        check_device("gpu")
    with pytest.raises(ConfigError, match="fp8"):
        load(resolve("resnet18"), weights="random:0", precision="fp8")  # type: ignore[arg-type]


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", TINY])
def test_cuda_agrees_with_the_cpu(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    spec, batch = resolve(name), pixels(4, 224, 224)
    want = load(spec, weights="random:0")(batch)
    for precision, tolerance in (("fp32", 0.01), ("bf16", 0.05), ("fp16", 0.01)):
        backbone = load(
            spec, weights="random:0", device="cuda", precision=precision, channels_last=True
        )  # type: ignore[arg-type]
        for key, tokens in backbone(batch).items():
            assert tokens.is_cuda
            assert (tokens.cpu() - want[key]).norm() / want[key].norm() < tolerance
