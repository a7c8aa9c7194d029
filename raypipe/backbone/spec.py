"""What a backbone is, declared: model, layers, preprocessing, and the folders its tokens go to.

Plain values, picklable and comparable: a spec travels to workers and into fingerprints. Making one
from a name is ``registry``; running one is ``model``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from raypipe.backbone.preprocess import Preprocess
from raypipe.errors import ConfigError, UnknownName

Library = Literal["timm", "open_clip", "torchvision"]
# out: what the module returns. q, k, v: a third of a fused qkv projection's output, bias included,
# unscaled. norm: through the model's final norm (timm). clip: through ln_post, then visual.proj,
# token by token (open_clip). features: what timm's forward_features returns; it has no module.
Part = Literal["out", "q", "k", "v", "norm", "clip", "features"]
Option = str | int | bool


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer to be taken, and the store folder for it.

    key : short name, unique in the spec: "last", "11", "layer4", "blocks.3.attn.qkv-q"
    module : dotted path inside the vision model; "" for part "features"
    dim : channels of a token where declared; None where the model must be asked (``model.layouts``)
    """

    key: str
    module: str
    part: Part = "out"
    folder: str
    dim: int | None = None

    def __post_init__(self) -> None:
        if not self.folder or self.folder != safe_name(self.folder):
            raise ConfigError(
                f"folder {self.folder!r} is not a plain folder name; try {safe_name(self.folder)!r}"
            )
        if self.part in ("q", "k", "v") and self.module.rpartition(".")[2] != "qkv":
            raise ConfigError(
                f"part {self.part!r} needs a fused qkv projection, not {self.module!r}; "
                "name a module that ends in .qkv, or take its whole output"
            )


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """One model with the layers taken from it in one forward pass.

    arch : the library's own name; timm's with its weights tag
    tag : which published weights "pretrained" means, where ``arch`` does not say so
    patch_size : pixels of a patch's side; None where it is not declared
    options : the library's constructor options, as sorted pairs
    """

    name: str
    library: Library
    arch: str
    tag: str = ""
    layers: tuple[LayerSpec, ...]
    preprocess: Preprocess
    patch_size: int | None = None
    options: tuple[tuple[str, Option], ...] = ()

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigError(f"backbone {self.name} takes no layer; name at least one")
        for what in ("key", "folder"):
            values = [getattr(layer, what) for layer in self.layers]
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ConfigError(
                    f"two layers of {self.name} share the {what} {twice[0]!r}; name each once"
                )

    def layer(self, key: str) -> LayerSpec:
        """The layer of that key; raises UnknownName."""
        for layer in self.layers:
            if layer.key == key:
                return layer
        raise UnknownName.of("layer", key, [layer.key for layer in self.layers])

    def folder(self, key: str) -> str:
        """The store folder of that layer's tokens, as users have it: ``dinov2_q_last``."""
        return self.layer(key).folder

    def identity(self, key: str) -> dict[str, Any]:
        """What decides that layer's numbers, weights apart, as JSON values for a fingerprint."""
        layer = self.layer(key)
        return {
            "library": self.library,
            "arch": self.arch,
            "options": dict(self.options),
            "module": layer.module,
            "part": layer.part,
            "preprocess": self.preprocess.describe(),
        }


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """How one layer's tokens lie: ``n_prefix`` of them (CLS, registers), then a grid, row by row.

    grid : (rows, columns) of patches, or None where the tokens are not a known grid
    """

    n_tokens: int
    dim: int
    n_prefix: int = 0
    grid: tuple[int, int] | None = None

    def describe(self) -> dict[str, Any]:
        """As plain JSON values, for manifests."""
        order = "prefix tokens, then patches row by row" if self.n_prefix else "patches row by row"
        return {
            "n_tokens": self.n_tokens,
            "dim": self.dim,
            "n_prefix": self.n_prefix,
            "grid": list(self.grid) if self.grid else None,
            "order": order if self.grid else "as the model gives them",
        }


def safe_name(text: str) -> str:
    """``text`` with every character that is awkward in a path turned into "-"."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")


def layer_folder(name: str, key: str) -> str:
    """The store folder of a library's model and layer: ``timm-resnet10t_layer3``."""
    return safe_name(f"{name}_{key}")


def sorted_options(options: Mapping[str, Option]) -> tuple[tuple[str, Option], ...]:
    """``options`` as pairs in one order, so that equal specs are equal."""
    return tuple(sorted(options.items()))
