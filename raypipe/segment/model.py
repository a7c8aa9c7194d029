"""Which network: ours by its sizes, or one of a library by name; built from a seed, the same anywhere.

    unet                  `UNetConfig`: our own, made for exact tiles
    smp:NAME:ENCODER      `LibraryConfig`: segmentation-models-pytorch, e.g. smp:Unet:resnet34

`spec_of` reads the command line's word, `record` and `spec_from` are what a trained model is saved
with, `build_model` makes the module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from raypipe.backbone.seeded import fill_random
from raypipe.errors import ConfigError, UnknownName
from raypipe.segment.library import LibraryConfig, build_library, library_blocks, load_encoder
from raypipe.segment.unet import UNet, UNetConfig, Up

__all__ = [
    "LibraryConfig",
    "ModelSpec",
    "UNet",
    "UNetConfig",
    "Up",
    "build_model",
    "checkpoint_blocks",
    "record",
    "spec_from",
    "spec_of",
]

ModelSpec = UNetConfig | LibraryConfig
_FORMS = "unet or smp:NAME:ENCODER, e.g. smp:Unet:resnet34"


def spec_of(
    model: str,
    *,
    in_channels: int,
    classes: int,
    encoder_weights: str | None = None,
    **unet: Any,
) -> ModelSpec:
    """The spec that ``model`` names; ``unet``: width, depth, up, dropout, for ours alone.

    Raises UnknownName, ConfigError.
    """
    kind, *names = model.split(":")
    sizes: dict[str, Any] = {"in_channels": in_channels, "classes": classes}
    if kind == "unet" and not names:
        if encoder_weights is not None:
            raise ConfigError(
                f"encoder_weights={encoder_weights!r} with model unet: our U-Net has no published"
                " encoder; choose smp:NAME:ENCODER, or leave the weights out"
            )
        return UNetConfig(**sizes, **unet)
    if kind == "smp" and len(names) == 2:
        architecture, encoder = names
        return LibraryConfig(
            architecture=architecture, encoder=encoder, encoder_weights=encoder_weights, **sizes
        )
    raise UnknownName.of("model", model, ("unet", "smp:Unet:resnet34"), f"give {_FORMS}")


def build_model(spec: ModelSpec, seed: int = 0) -> nn.Module:
    """A new model on the CPU in training mode; equal bits for equal ``spec`` and ``seed``.

    Weights come from (seed, name) alone: neither the process's generators nor the machine matter,
    and the former are left as they are. An encoder's published weights replace its own.
    """
    with torch.random.fork_rng(devices=[]):
        # For a parameter of one number, which looks like a constant. Not by torch.manual_seed: it
        # would seed CUDA's generators too, which are not put back.
        torch.random.default_generator.manual_seed(seed)
        if isinstance(spec, UNetConfig):
            return fill_random(UNet(spec), seed)
        return load_encoder(fill_random(build_library(spec), seed), spec)


def checkpoint_blocks(model: nn.Module) -> Sequence[nn.Module]:
    """Modules of ``model`` that may be recomputed instead of kept; may be empty."""
    return model.checkpoint_blocks() if isinstance(model, UNet) else library_blocks(model)


def record(spec: ModelSpec) -> dict[str, Any]:
    """``spec`` as plain values, for model.json."""
    return {"model": spec.name, **asdict(spec)}


def spec_from(saved: Mapping[str, Any]) -> ModelSpec:
    """The spec that `record` wrote. Raises ConfigError when it is not one."""
    fields = {name: value for name, value in saved.items() if name != "model"}
    kind = UNetConfig if saved.get("model") == "unet" else LibraryConfig
    try:
        return kind(**fields)
    except TypeError as error:
        raise ConfigError(
            f"saved model {dict(saved)}: {error}; it was written by another version of raypipe"
        ) from error
