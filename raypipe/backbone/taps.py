"""Taps on a model's layers: what each put out, as tokens, in one forward pass.

A tap copies at the moment its layer has run: later in-place operations (ResNet's ReLU) would
otherwise write into what was taken. Once all taps have their tokens the forward is left off.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raypipe.backbone.spec import BackboneSpec, LayerSpec
from raypipe.errors import InputError, UnknownName

_ALWAYS_NCHW = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


class _AllTaken(Exception):  # not an error: it ends a forward whose rest nobody needs
    pass


@dataclass(frozen=True)
class Taken:
    """One layer's tokens, (B, T, D) float32 contiguous; grid (rows, columns) where it was a map."""

    tokens: Tensor
    grid: tuple[int, int] | None


class Taps:
    """``spec``'s layers of ``model``, tapped. Not for two threads at once."""

    def __init__(self, model: nn.Module, spec: BackboneSpec) -> None:
        self._model, self._spec = model, spec
        self._taken: dict[str, Taken] = {}
        self._ran: Counter[str] = Counter()
        self._proven = False  # until one whole forward has shown that each layer runs exactly once
        for layer in spec.layers:
            if layer.part != "features":
                _module(model, layer, spec.name).register_forward_hook(
                    partial(self._on_output, layer)
                )

    def run(self, pixels: Tensor) -> dict[str, Taken]:
        """Tokens of each layer for (B, 3, H, W) pixels, by key in the spec's order.

        The first call runs the whole model and raises InputError if a layer ran never, or more than
        once; later calls stop after the last layer.
        """
        self._taken, self._ran = {}, Counter()
        try:
            self._forward(pixels)
            self._prove()
            return {layer.key: self._taken[layer.key] for layer in self._spec.layers}
        finally:
            self._taken = {}  # a failed forward leaves nothing: the retry needs the memory

    def _forward(self, pixels: Tensor) -> None:
        features = [layer for layer in self._spec.layers if layer.part == "features"]
        try:
            output = _features(self._model, pixels) if features else self._model(pixels)
        except _AllTaken:
            return
        for layer in features:
            self._on_output(layer, self._model, (), output)

    def _on_output(
        self, layer: LayerSpec, module: nn.Module, _inputs: object, output: object
    ) -> None:
        self._ran[layer.key] += 1
        if self._ran[layer.key] == 1:
            self._taken[layer.key] = _take(layer, module, output, self._model)
        needs_end = layer.part == "features"
        if self._proven and not needs_end and len(self._taken) == len(self._spec.layers):
            raise _AllTaken

    def _prove(self) -> None:
        if self._proven:
            return
        for layer in self._spec.layers:
            runs = self._ran[layer.key]
            if runs != 1:
                how = f"runs {runs} times" if runs else "is never called"
                raise InputError(
                    f"layer {layer.module!r} of {self._spec.name} {how} in one forward pass, so "
                    "what it put out is not one thing; name the module around it"
                )
        self._proven = True


def _module(model: nn.Module, layer: LayerSpec, name: str) -> nn.Module:
    try:
        return model.get_submodule(layer.module)
    except AttributeError:
        known = [path for path, _ in model.named_modules() if path]
        raise UnknownName.of("layer", layer.module, known, f"module paths of {name}") from None


def _features(model: Any, pixels: Tensor) -> object:
    """The model's features before pooling: timm's own notion, also inside of an open_clip tower."""
    return getattr(model, "trunk", model).forward_features(pixels)


def _take(layer: LayerSpec, module: nn.Module, output: object, model: Any) -> Taken:
    """``output`` as tokens, through the layer's part, copied."""
    values, grid = _as_tokens(_one_tensor(output, layer), layer, module, model)
    if layer.part in ("q", "k", "v"):
        third = values.shape[-1] // 3  # timm lays q, k, v side by side
        start = third * ("q", "k", "v").index(layer.part)
        values = values[..., start : start + third]
    elif layer.part == "norm":
        values = model.norm.forward(values)  # .forward: a tap on the norm itself must not see this
    elif layer.part == "clip":
        values = model.ln_post.forward(values)
        values = values if model.proj is None else values @ model.proj
    return Taken(values.to(torch.float32, memory_format=torch.contiguous_format, copy=True), grid)


def _one_tensor(output: object, layer: LayerSpec) -> Tensor:
    """The one tensor in ``output``; attention modules return (tensor, None)."""
    if isinstance(output, tuple):
        tensors = [item for item in output if item is not None]
        output = tensors[0] if len(tensors) == 1 else output
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise InputError(
            f"layer {layer.module or layer.key!r} puts out {type(output).__name__}, "
            "not one float tensor; name a module inside of it"
        )
    return output


def _as_tokens(
    output: Tensor, layer: LayerSpec, module: nn.Module, model: nn.Module
) -> tuple[Tensor, tuple[int, int] | None]:
    """(B, T, D) of (B, D), (B, T, D) or a map, whose places go row by row; and the map's grid."""
    if output.ndim == 2:
        return output[:, None, :], None
    if output.ndim == 3:
        return output, None
    if output.ndim != 4:
        raise InputError(
            f"layer {layer.module!r} puts out shape {tuple(output.shape)}; raypipe takes (B, D), "
            "(B, T, D) or maps: name another module"
        )
    if _is_channels_last(module, model):
        return output.flatten(1, 2), (output.shape[1], output.shape[2])
    return output.flatten(2).transpose(1, 2), (output.shape[2], output.shape[3])


def _is_channels_last(module: nn.Module, model: nn.Module) -> bool:
    """Whether a map is (B, h, w, D), as timm says of its Swin-like models, and not (B, D, h, w)."""
    stated = getattr(module, "output_fmt", None) or getattr(
        getattr(model, "trunk", model), "output_fmt", "NCHW"
    )
    return not isinstance(module, _ALWAYS_NCHW) and str(getattr(stated, "value", stated)) == "NHWC"
