"""Pictures, models whose every part matters, and tokens by the shortest way."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raypipe.backbone import BackboneSpec
from raypipe.backbone.model import Backbone
from raypipe.backbone.seeded import fill_random

CPU = torch.device("cpu")
TINY = "timm:vit_tiny_patch16_224"


def pixels(n: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=generator)


def alive(model: nn.Module) -> nn.Module:
    """Weights under which every part matters: layer scale, biases and norms are constants else."""
    fill_random(model, 7)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "ls" in name or parameter.ndim == 1:
            noise = 0.3 * torch.rand(parameter.shape, generator=generator)
            parameter.data += noise
    return model


def run(
    spec: BackboneSpec, model: nn.Module, batch: torch.Tensor, **options: Any
) -> dict[str, torch.Tensor]:
    return Backbone(spec, model, device=CPU, **options)(batch)


def normalised(spec: BackboneSpec, batch: torch.Tensor) -> torch.Tensor:
    """By hand: scale, normalise, pad; preprocessing itself is tested against the libraries."""
    mean, std = torch.tensor(spec.preprocess.mean), torch.tensor(spec.preprocess.std)
    x = ((batch / 255 - mean) / std).permute(0, 3, 1, 2)
    side = spec.preprocess.pad_multiple or 1
    return nn.functional.pad(x, (0, -x.shape[3] % side, 0, -x.shape[2] % side)).contiguous()
