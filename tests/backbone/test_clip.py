"""CLIP's tokens against OpenAI's vision transformer by hand, small and at full size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from backbone_kit import alive, normalised, pixels, run
from torch import nn

from raypipe.backbone import LayerSpec, resolve
from raypipe.backbone.libraries import build


@torch.no_grad()
def clip_by_hand(
    state: dict[str, torch.Tensor], x: torch.Tensor, depth: int, heads: int
) -> torch.Tensor:
    """OpenAI's vision transformer from its parameters alone, all tokens through ln_post and proj."""
    F = nn.functional  # noqa: N806

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    x = (
        F.conv2d(x, state["conv1.weight"], stride=state["conv1.weight"].shape[-1])
        .flatten(2)
        .transpose(1, 2)
    )
    cls = state["class_embedding"].expand(len(x), 1, -1)
    x = norm("ln_pre", torch.cat([cls, x], 1) + state["positional_embedding"])
    n, t, d = x.shape
    for k in range(depth):
        name = f"transformer.resblocks.{k}"
        y = norm(f"{name}.ln_1", x)
        qkv = y @ state[f"{name}.attn.in_proj_weight"].T + state[f"{name}.attn.in_proj_bias"]
        q, key, v = (
            part.reshape(n, t, heads, d // heads).transpose(1, 2) for part in qkv.chunk(3, -1)
        )
        weights = (q @ key.transpose(-1, -2) / (d // heads) ** 0.5).softmax(-1)
        x = x + linear(f"{name}.attn.out_proj", (weights @ v).transpose(1, 2).reshape(n, t, d))
        y = linear(f"{name}.mlp.c_fc", norm(f"{name}.ln_2", x))
        x = x + linear(f"{name}.mlp.c_proj", y * torch.sigmoid(1.702 * y))  # quick GELU
    return norm("ln_post", x) @ state["proj"]


@torch.no_grad()
@pytest.mark.parametrize("enc_layer", [-1, 5])
def test_clip_is_a_hand_written_forward_on_a_small_tower(enc_layer: int) -> None:
    spec, batch = resolve("open_clip:ViT-S-32"), pixels(2, 224, 224)
    spec = replace(spec, options=(("quick_gelu", True),))
    model = alive(build(spec))
    depth = enc_layer % 12 + 1
    layer = LayerSpec(key="x", module=f"transformer.resblocks.{depth - 1}", part="clip", folder="x")
    tokens = run(replace(spec, layers=(layer,)), model, batch)["x"]
    want = clip_by_hand(dict(model.state_dict()), normalised(spec, batch), depth=depth, heads=6)
    torch.testing.assert_close(tokens, want, rtol=1e-4, atol=1e-4)
    if enc_layer == -1:
        torch.testing.assert_close(
            tokens[:, 0], model(normalised(spec, batch)), rtol=1e-4, atol=1e-4
        )


@pytest.mark.slow
@torch.no_grad()
def test_clip_full_size_is_a_hand_written_forward() -> None:
    spec, batch = resolve("clip"), pixels(1, 224, 224)
    model = alive(build(spec))
    tokens = run(spec, model, batch)["last"]
    assert tokens.shape == (1, 257, 768)
    want = clip_by_hand(dict(model.state_dict()), normalised(spec, batch), depth=24, heads=16)
    torch.testing.assert_close(tokens, want, rtol=1e-4, atol=1e-4)
