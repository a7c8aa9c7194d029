"""Networks of segmentation-models-pytorch, an optional package: ``smp:NAME:ENCODER``.

Built with random weights, which the caller seeds; an encoder's published weights come from where
the library keeps them on the Hugging Face hub (its cache first), or from a file. A dead network is
not waited for (`raypipe.backbone.weights`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from raypipe.backbone.weights import Hub, locate
from raypipe.errors import ConfigError, UnknownName, WeightsUnavailable

_INSTALL = "pip install 'raypipe[smp]'"


@dataclass(frozen=True, kw_only=True)
class LibraryConfig:
    """A network of segmentation-models-pytorch. Raises ConfigError when a value breaks its rule."""

    architecture: str
    """Unet, UnetPlusPlus, FPN, DeepLabV3Plus, ..."""
    encoder: str
    """resnet34, efficientnet-b0, ..."""
    in_channels: int = 1
    """Channels of an image."""
    classes: int = 1
    """Maps that come out, as for our own U-Net."""
    encoder_weights: str | None = None
    """None: random; a name of published ones such as imagenet; or a .safetensors or .pth file."""

    def __post_init__(self) -> None:
        for name in ("in_channels", "classes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{self.name} {name}={getattr(self, name)}: give at least 1")

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"smp:{self.architecture}:{self.encoder}"


def build_library(spec: LibraryConfig) -> nn.Module:
    """The network of ``spec`` with the library's own random weights.

    Raises ConfigError where the package is missing, UnknownName for a name it does not have.
    """
    smp = _package(spec)
    architectures = {cls.__name__: cls for cls in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    if spec.architecture not in architectures:
        raise UnknownName.of("architecture", spec.architecture, architectures)
    encoders = smp.encoders.get_encoder_names()
    if spec.encoder not in encoders and not spec.encoder.startswith("tu-"):
        raise UnknownName.of("encoder", spec.encoder, encoders, "or tu-NAME of timm")
    try:
        return architectures[spec.architecture](
            encoder_name=spec.encoder,
            encoder_weights=None,
            in_channels=spec.in_channels,
            classes=spec.classes,
        )
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"{spec.name} cannot be built: {reason}; choose another encoder for this architecture"
        ) from error


def load_encoder(model: nn.Module, spec: LibraryConfig) -> nn.Module:
    """``model`` with its encoder's weights replaced by those that ``spec`` names; returns it.

    They are of colour images: for another number of channels the library folds the first
    convolution. Raises WeightsUnavailable: not published, not to be fetched, of another encoder.
    """
    if spec.encoder_weights is None:
        return model
    path = _weights_file(spec, spec.encoder_weights)
    donor: Any = build_library(replace(spec, in_channels=3)).get_submodule("encoder")
    try:
        donor.load_state_dict(_read(path))
    except (RuntimeError, KeyError, ValueError, OSError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsUnavailable(
            f"weights {path} do not load into encoder {spec.encoder}: {reason}; give a file of it"
        ) from error
    donor.set_in_channels(spec.in_channels, pretrained=True)
    model.get_submodule("encoder").load_state_dict(donor.state_dict())
    return model


def library_blocks(model: nn.Module) -> Sequence[nn.Module]:
    """The decoder's blocks, where the largest maps are; none for a decoder without any."""
    decoder = getattr(model, "decoder", None)
    blocks = getattr(decoder, "blocks", ())
    return list(blocks.values()) if isinstance(blocks, nn.ModuleDict) else list(blocks)


def _package(spec: LibraryConfig) -> Any:
    try:
        return import_module("segmentation_models_pytorch")
    except ImportError as error:
        raise ConfigError(
            f"model {spec.name} needs segmentation-models-pytorch ({error}): {_INSTALL}"
        ) from error


def _weights_file(spec: LibraryConfig, weights: str) -> Path:
    known = _package(spec).encoders.encoders.get(spec.encoder, {}).get("pretrained_settings", {})
    if weights in known:
        source = known[weights]
        hub = Hub(repo=f"{source['repo_id']}@{source['revision']}", files=("model.safetensors",))
        return locate(hub, f"encoder {spec.encoder}", "it as --encoder-weights FILE")
    path = Path(weights).expanduser()
    if not path.is_file():
        names = ", ".join(sorted(known)) or "none"
        raise WeightsUnavailable(
            f"encoder weights {weights!r} of {spec.encoder}: neither a file nor published"
            f" (published: {names}); give one of these, a file, or none for random weights"
        )
    return path


def _read(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
