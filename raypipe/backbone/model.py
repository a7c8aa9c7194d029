"""A running backbone: uint8 pixels in, tokens of the chosen layers out.

``load`` gives the spec its weights; ``layouts`` and ``shapes`` say what will come out without any,
so that a store can be sized first. Names and options are ``registry``; taking layers is ``taps``.
"""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from raypipe.backbone.libraries import build, build_on_meta, load_file, published
from raypipe.backbone.seeded import fill_random
from raypipe.backbone.spec import BackboneSpec, TokenLayout
from raypipe.backbone.taps import Taken, Taps
from raypipe.backbone.weights import local_file, locate
from raypipe.errors import ConfigError, DeviceUnavailable, InputError, RaypipeError

Precision = Literal["fp32", "bf16", "fp16"]
# Autocast, not half weights: the residual stream stays float32, and DINOv2's large activations fit.
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Backbone:
    """A model on its device, tapped at its spec's layers. Not for two threads at once."""

    def __init__(
        self,
        spec: BackboneSpec,
        model: nn.Module,
        *,
        device: torch.device,
        precision: Precision = "fp32",
        channels_last: bool = False,
    ) -> None:
        if precision not in _AUTOCAST:
            raise ConfigError(
                f"precision {precision!r} is not one of {', '.join(_AUTOCAST)}; choose one"
            )
        self.spec, self.device, self.precision = spec, device, precision
        self.weights_sha256 = digest_of(model)
        self.n_parameters = sum(parameter.numel() for parameter in model.parameters())
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        # model.to(memory_format=contiguous_format) is a no-op that torch refuses for some modules
        model = model.eval().requires_grad_(False).to(device)
        self._model = model.to(memory_format=torch.channels_last) if channels_last else model
        self._taps = Taps(self._model, spec)

    @property
    def model(self) -> nn.Module:
        """The model itself: frozen, in eval mode, on its device."""
        return self._model

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        """Tokens of each layer, by key.

        batch : (B, H, W, 3) uint8 on any device, as ``spec.preprocess.host`` gives them
        returns : (B, T, D) float32 on this backbone's device, contiguous, no gradient

        Raises InputError when a layer does not run exactly once, or puts out no tokens.
        """
        with torch.inference_mode():
            moved = batch.to(self.device, non_blocking=True)
            pixels = self.spec.preprocess.device(moved).contiguous(
                memory_format=self._memory_format
            )
            with self._autocast():
                return {key: taken.tokens for key, taken in self._taps.run(pixels).items()}

    __call__ = forward

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = _AUTOCAST[self.precision]
        return torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext()


def load(
    spec: BackboneSpec,
    *,
    weights: str = "pretrained",
    device: str = "cpu",
    precision: Precision = "fp32",
    channels_last: bool = False,
) -> Backbone:
    """The backbone of ``spec``, ready to run.

    weights : "pretrained", "random:SEED" or a .safetensors, .pth or .pt file of this model
    device : "cpu", "cuda", "cuda:1"
    precision : of products; fp32 leaves torch's default, in which cuDNN convolutions use TF32

    Raises WeightsUnavailable, DeviceUnavailable, ConfigError, UnknownName. torch's global generator
    is left as it was.
    """
    where = check_device(device)
    model = _weighted(spec, weights)
    return Backbone(spec, model, device=where, precision=precision, channels_last=channels_last)


def check_device(device: str) -> torch.device:
    """``device`` as torch's; raises DeviceUnavailable when this machine has it not."""
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device {device!r} is not a device; give cpu, cuda or cuda:0") from None
    if where.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (where.index or 0) >= count:
            raise DeviceUnavailable(
                f"device {device!r}: this machine has {count} CUDA devices; use --device cpu"
            )
    elif where.type != "cpu":
        raise DeviceUnavailable(
            f"device {device!r} is not one that raypipe runs on; use cpu or cuda"
        )
    return where


def digest_of(model: nn.Module) -> str:
    """sha256 over the sorted state dict: each tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{values.dtype}|{tuple(values.shape)}|".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def layouts(spec: BackboneSpec, image_hw: tuple[int, int]) -> dict[str, TokenLayout]:
    """What each layer will put out for pictures of (height, width) pixels, before preprocessing.

    Computed by running the model on torch's meta device: no weights, no memory, the first time a
    second or so. Raises InputError where the model cannot run so, or not at that size.
    """
    return dict(_layouts(spec, *image_hw))


def shapes(spec: BackboneSpec, image_hw: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """(tokens, dim) of each layer for pictures of (height, width) pixels: ``layouts`` in short."""
    return {key: (layout.n_tokens, layout.dim) for key, layout in layouts(spec, image_hw).items()}


@lru_cache(maxsize=32)
def _layouts(spec: BackboneSpec, height: int, width: int) -> tuple[tuple[str, TokenLayout], ...]:
    rows, columns = spec.preprocess.output_size(height, width)
    model = build_on_meta(spec)
    _check_patches(spec, model, rows, columns)
    try:
        with torch.inference_mode(), torch.device("meta"):
            taken = Taps(model, spec).run(torch.empty(1, 3, rows, columns))
    except RaypipeError:
        raise
    except Exception as error:  # whatever a model's code raises for sizes it does not take
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{spec.name} does not run on {rows}x{columns} pixels (pictures of {height}x{width}): "
            f"{reason}; choose another --image-size"
        ) from error
    return tuple((key, _layout(spec, model, one, (rows, columns))) for key, one in taken.items())


def _layout(spec: BackboneSpec, model: nn.Module, taken: Taken, hw: tuple[int, int]) -> TokenLayout:
    """Names the tokens' places where known: a map's, or a ViT's patches behind its prefix."""
    _, n_tokens, dim = taken.tokens.shape
    if taken.grid is not None:
        return TokenLayout(n_tokens=n_tokens, dim=dim, grid=taken.grid)
    trunk = getattr(model, "trunk", model)
    patch = spec.patch_size or _patch_size(trunk)
    n_prefix = getattr(trunk, "num_prefix_tokens", 1 if hasattr(trunk, "class_embedding") else 0)
    grid = (hw[0] // patch, hw[1] // patch) if patch else (0, 0)
    if grid[0] * grid[1] and n_tokens == n_prefix + grid[0] * grid[1]:
        return TokenLayout(n_tokens=n_tokens, dim=dim, n_prefix=n_prefix, grid=grid)
    return TokenLayout(n_tokens=n_tokens, dim=dim)


def _check_patches(spec: BackboneSpec, model: nn.Module, rows: int, columns: int) -> None:
    """Raises ConfigError for a chosen size of which the model would drop the last pixels.

    A model's own size may do that (SigLIP's 384 by patches of 14), and is left to it.
    """
    patch = spec.patch_size or _patch_size(getattr(model, "trunk", model))
    chosen = {"img_size", "image_size"} & dict(spec.options).keys()
    if chosen and patch and (rows % patch or columns % patch):
        raise ConfigError(
            f"image size {rows} is no multiple of {spec.name}'s patch of {patch} pixels; "
            f"choose {max(rows // patch, 1) * patch} or {(rows // patch + 1) * patch}"
        )


def _patch_size(trunk: nn.Module) -> int | None:
    """Pixels of a square patch, where the model says so."""
    size = getattr(getattr(trunk, "patch_embed", None), "patch_size", None)
    size = (size, size) if isinstance(size, int) else size
    return int(size[0]) if isinstance(size, tuple) and len(set(size)) == 1 else None


def _weighted(spec: BackboneSpec, weights: str) -> nn.Module:
    """The model with the weights that ``weights`` names, on the CPU."""
    kind, _, seed = weights.partition(":")
    with torch.random.fork_rng(devices=[]):  # constructors draw initial weights: the caller's
        if kind == "random":  # generator must not notice
            if not seed.isascii() or not seed.isdigit():
                raise ConfigError(
                    f"weights {weights!r} name no seed; write random:0 or another number"
                )
            torch.random.default_generator.manual_seed(0)
            return fill_random(build(spec), int(seed))
        path = (
            locate(published(spec), spec.name) if weights == "pretrained" else local_file(weights)
        )
        return load_file(spec, Path(path))
