"""Radius and alignment as measured, against an independent measurement on positive weights."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from tile_models import (
    Attention,
    Gated,
    Hidden,
    Normed,
    Positions,
    Strided,
    There,
    UNet,
    Where,
    dilated,
    fitted,
    seeded,
)
from torch import nn

from raypipe.errors import ConfigError, InputError
from raypipe.tile.field import measure, stated
from raypipe.tile.probe import Probe


def by_perturbation(model: nn.Module, axis: int, length: int, phases: range) -> int:
    """Largest distance at which a pixel changes an output of a copy that has positive weights only
    and is fed positive numbers: no ReLU is dead, nothing cancels; a maximum is always won by the pixel.
    """
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for p in model.parameters():
            p.abs_().add_(1e-3)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.zero_()
    shape = [32, 32]
    shape[axis] = length
    image = torch.rand(1, 1, *shape, dtype=torch.float64)
    worst = 0
    with torch.inference_mode():
        before = model(image)
        for at in phases:
            changed = image.clone()
            changed.narrow(2 + axis, at, 1).mul_(1e3).add_(1e3)
            off = (model(changed) - before).abs().movedim(2 + axis, -1).flatten(0, -2).amax(0)
            where = np.flatnonzero(off.numpy() > 1e-12 * float(before.abs().max()))
            worst = max(worst, at - where[0], where[-1] - at)
    return int(worst)


@pytest.mark.parametrize(
    ("make", "align"),
    [
        (lambda: UNet(2), 2),
        (lambda: UNet(3), 4),
        (lambda: UNet(4, width=2), 8),
        (lambda: UNet(3, up="bilinear"), 4),
        (lambda: fitted(width=2, depth=3), 4),
        (dilated, 1),
        (lambda: Strided(3), 3),
        (lambda: Strided(4), 4),
    ],
)
def test_radius_and_alignment_of_models(make, align: int) -> None:
    model = seeded(make)
    field = measure(model, 1)
    assert field.exact and field.align == (align, align)
    for axis in range(2):
        wanted = by_perturbation(model, axis, 256 if align < 8 else 384, range(120, 120 + align))
        assert field.radius[axis] == wanted


def test_a_network_that_refuses_the_first_sizes_is_measured_at_larger_ones() -> None:
    """Depth 7 halves the sides 6 times: 32 pixels are an InputError of its own."""
    with Probe.of(seeded(lambda: fitted(width=1, depth=7)), 1, 2) as probe:
        assert probe.base == 64


def test_a_device_out_of_memory_is_no_refusal() -> None:
    class Full(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        measure(Full(), 1)


def test_the_axes_are_measured_apart() -> None:
    field = measure(seeded(dilated), 1)
    assert field.radius == (1 + 4, 1 + 4 + 18) and field.halo == field.radius


def test_a_3d_model() -> None:
    field = measure(seeded(lambda: UNet(2, width=2, dims=3)), 1, dims=3)
    plane = measure(seeded(lambda: UNet(2)), 1)
    assert field.align == (2, 2, 2) and field.radius == (plane.radius[0],) * 3


def test_a_dead_and_hidden_stride_is_found() -> None:
    field = measure(seeded(Hidden), 1)
    assert field.align == (4, 4) and field.radius == (8, 8)


def test_a_border_that_is_felt_farther_than_any_pixel_counts() -> None:
    assert measure(seeded(There), 1).radius == (0, 5)


def test_the_model_is_left_as_it_was() -> None:
    model = seeded(lambda: UNet(2))
    before = copy.deepcopy(model.state_dict())
    measure(model, 1)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(p.is_inference() for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Normed(nn.InstanceNorm2d(4)), r"norm \(InstanceNorm2d\) spreads"),
        (lambda: Normed(nn.GroupNorm(2, 4)), r"norm \(GroupNorm\) spreads"),
        (lambda: Normed(nn.BatchNorm2d(4)).train(), r"norm \(BatchNorm2d in train mode\) spreads"),
        (Gated, r"pool \(AdaptiveAvgPool2d\) spreads"),
        (Positions, "depends on where a pixel lies"),
        (lambda: UNet(2, up="corners"), "depends on where a pixel lies"),
    ],
)
def test_what_tiles_cannot_give_is_said(make, why: str) -> None:
    training = "train mode" in why
    model = seeded(make).train(training)
    field = measure(model, 1)
    assert not field.exact and re.search(why, field.why_not), field.why_not


def test_attention_is_named() -> None:
    field = measure(seeded(Attention), 4)
    assert "mix (MultiheadAttention) spreads" in field.why_not


def test_layer_norm_over_channels_is_local() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x.movedim(1, -1)).movedim(-1, 1)

    assert measure(seeded(lambda: Normed(Last())), 1).radius == (2, 2)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Where, "torch.(where|gt) in the model does not hand NaN on"),
        (lambda: nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Dropout(0.5)).train(), "eval"),
        (lambda: nn.Conv2d(1, 1, 3), "does not map .* to the same size"),
        (lambda: nn.Conv2d(3, 1, 3, padding=1), "check in_channels"),
    ],
)
def test_a_probe_that_fails_says_so(make, why: str) -> None:
    model = make()
    with pytest.raises(InputError, match=why):
        measure(model, 1)


def test_a_model_that_casts_is_told_so() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x.float())

    with pytest.raises(InputError, match=r"refuses to run in float64.*x\.float\(\)"):
        measure(Casting(), 1)


def test_labels_cannot_be_probed() -> None:
    class Labels(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum(1, keepdim=True).round().to(torch.int64)

    with pytest.raises(InputError, match="int64, which shows no NaN"):
        measure(Labels(), 1)


def test_what_the_user_states_is_checked() -> None:
    assert stated(30, 16, 2).halo == (32, 32)
    assert stated((3, 5), (1, 2), 2).halo == (3, 6)
    with pytest.raises(ConfigError, match="align 0"):
        stated(3, 0, 2)
    with pytest.raises(ConfigError, match="halo"):
        stated((1, 2, 3), 1, 2)


def test_attention_without_a_module_stops_at_the_image_that_takes_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tokens = x.flatten(2).mT
            return (torch.softmax(tokens @ tokens.mT, -1) @ tokens).mT.reshape(x.shape)

    monkeypatch.setattr("raypipe.tile.field.PATIENCE_S", -1.0)
    field = measure(Plain(), 1)
    assert "an image of 64 pixels along axis 0, and no longer one was tried" in field.why_not
