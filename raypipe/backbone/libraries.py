"""The three libraries that models come from: build one, find its published weights, load a file.

One adapter a library; each gives a module on the CPU in float32. Only the vision part of a CLIP
model is ever built. Fetching is ``weights``; running is ``model``.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from raypipe.backbone.spec import BackboneSpec
from raypipe.backbone.weights import Hub, Source, Url
from raypipe.errors import ConfigError, InputError, WeightsUnavailable

_CLASSIFIERS = ("head", "head.fc", "fc", "classifier", "head_dist", "last_linear")


def build(spec: BackboneSpec, *, n_classes: int | None = None) -> nn.Module:
    """The vision model of ``spec`` with its library's own initial weights, in evaluation mode.

    Takes torch's default device and generator as it finds them. Raises ConfigError when the library
    refuses the options, an image size that is no multiple of the patch above all.
    """
    try:
        model = _BUILDERS[spec.library](spec, n_classes)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"{spec.name} cannot be built with {dict(spec.options)}: {reason}; "
            "choose another --image-size or none"
        ) from error
    return model.eval()


def build_on_meta(spec: BackboneSpec) -> nn.Module:
    """The model of ``spec`` without memory: parameters have shapes, no values."""
    with torch.device("meta"):
        return build(spec)


def published(spec: BackboneSpec) -> Source:
    """Where the weights that "pretrained" means are; raises WeightsUnavailable if nowhere."""
    source = _SOURCES[spec.library](spec)
    if source is None:
        raise WeightsUnavailable(
            f"no weights are published for {spec.name}; "
            "give --weights FILE or --weights random:SEED"
        )
    return source


def load_file(spec: BackboneSpec, path: Path) -> nn.Module:
    """The model of ``spec`` with the weights in ``path``, each key accounted for.

    The library's own conversions apply (names of the original release, resized positions).
    Raises WeightsUnavailable when the file is not readable as plain tensors or is of another model.
    """
    try:
        return _LOADERS[spec.library](spec, path).eval()
    except InputError:
        raise
    except (
        Exception
    ) as error:  # pickle, zip, safetensors, load_state_dict: each raises its own kind
        raise WeightsUnavailable(
            f"weights {path} do not load into {spec.name}: {explain(error)}; "
            "give a .safetensors or .pth file of this very model"
        ) from error


def explain(error: Exception) -> str:
    """A loading error in one line: the first missing, unexpected, misshapen key, and how many."""
    text = str(error)
    if "TorchScript" in text:
        return "it is a TorchScript archive, which holds code; fetch its .safetensors release"
    if "Weights only load failed" in text or "weights_only" in text:
        return "it holds more than tensors, and raypipe loads nothing else (weights_only)"
    parts = []
    for kind in ("Missing", "Unexpected"):
        match = re.search(rf"{kind} key\(s\) in state_dict: (.*?)\. *(?:\n|$)", text)
        if match:
            keys = re.findall(r'"([^"]+)"', match.group(1))
            parts.append(f"{kind.lower()} key {keys[0]!r} (of {len(keys)})")
    wrong = re.findall(
        r"size mismatch for ([\w.]+): .*?shape (\S+\[.*?\]) .*?is (\S+\[.*?\])", text
    )
    if wrong:
        parts.append(f"{wrong[0][0]} is {wrong[0][1]}, the model's {wrong[0][2]} (of {len(wrong)})")
    return (
        ", ".join(parts)
        or f"{type(error).__name__}: {' '.join(text.split())[:200] or 'no reason given'}"
    )


# --- timm


def _build_timm(spec: BackboneSpec, n_classes: int | None) -> nn.Module:
    import timm

    heads = {} if n_classes is None else {"num_classes": n_classes}
    return timm.create_model(spec.arch, pretrained=False, **heads, **dict(spec.options))


def _source_timm(spec: BackboneSpec) -> Source | None:
    from timm.models import get_pretrained_cfg

    cfg = get_pretrained_cfg(spec.arch)
    if cfg is not None and cfg.hf_hub_id:
        files = ("model.safetensors", "pytorch_model.bin")
        return Hub(
            repo=cfg.hf_hub_id, files=(cfg.hf_hub_filename,) if cfg.hf_hub_filename else files
        )
    return Url(url=cfg.url) if cfg is not None and isinstance(cfg.url, str) and cfg.url else None


def _load_timm(spec: BackboneSpec, path: Path) -> nn.Module:
    """By timm's own loader, for its filters.

    It is strict only while the classifier has as many classes as the configuration says; so both
    are set to what the file holds, none included.
    """
    import timm

    overlay: dict[str, Any] = {"file": str(path), "custom_load": path.suffix == ".npz"}
    heads = {}
    if path.suffix != ".npz":
        heads["num_classes"] = _n_classes(read_tensors(path), spec.arch)
        overlay |= heads | {"label_offset": 0}
    return timm.create_model(
        spec.arch, pretrained=True, pretrained_cfg_overlay=overlay, **heads, **dict(spec.options)
    )


def _n_classes(state: dict[str, torch.Tensor], arch: str) -> int:
    """Rows of the classifier in ``state``; 0 when it holds none."""
    from timm.models import get_pretrained_cfg

    declared = getattr(get_pretrained_cfg(arch), "classifier", None) or ()
    for name in (*((declared,) if isinstance(declared, str) else declared), *_CLASSIFIERS):
        weight = state.get(f"{name}.weight")
        if weight is not None and weight.ndim in (2, 4):
            return int(weight.shape[0])
    return 0


# --- open_clip


def _build_open_clip(spec: BackboneSpec, n_classes: int | None) -> nn.Module:
    import open_clip
    from open_clip.model import _build_vision_tower

    config = copy.deepcopy(open_clip.get_model_config(spec.arch))
    options = dict(spec.options)
    vision = config["vision_cfg"] | {"timm_model_pretrained": False}
    if "image_size" in options:
        vision["image_size"] = options["image_size"]
    return _build_vision_tower(config["embed_dim"], vision, quick_gelu=bool(options["quick_gelu"]))


def _source_open_clip(spec: BackboneSpec) -> Source | None:
    import open_clip

    cfg = open_clip.get_pretrained_cfg(spec.arch, spec.tag) or {}
    if cfg.get("hf_hub"):
        repo, _, file = cfg["hf_hub"].rpartition("/")
        file = file or "open_clip_pytorch_model.bin"
        safe = (
            "open_clip_model.safetensors"
            if "_pytorch_model." in file
            else f"{Path(file).stem}.safetensors"
        )
        return Hub(repo=repo, files=tuple(dict.fromkeys((safe, file))))
    return Url(url=cfg["url"]) if cfg.get("url") else None


def _load_open_clip(spec: BackboneSpec, path: Path) -> nn.Module:
    """A whole CLIP checkpoint's vision part, or a file of the vision part alone."""
    from open_clip.model import resize_pos_embed

    model = _build_open_clip(spec, None)
    state = read_tensors(path)
    vision = {key: value for key, value in state.items() if key.startswith("visual.")}
    vision = vision or {f"visual.{key}": value for key, value in state.items()}
    resize_pos_embed(vision, SimpleNamespace(visual=model))
    model.load_state_dict({key.removeprefix("visual."): value for key, value in vision.items()})
    return model


# --- torchvision


def _build_torchvision(spec: BackboneSpec, n_classes: int | None) -> nn.Module:
    import torchvision

    heads = {} if n_classes is None else {"num_classes": max(n_classes, 1)}
    model = torchvision.models.get_model(spec.arch, weights=None, **heads)
    if n_classes == 0:
        model.fc = nn.Identity()
    return model


def _source_torchvision(spec: BackboneSpec) -> Source | None:
    import torchvision

    return Url(url=torchvision.models.get_model_weights(spec.arch)[spec.tag].url)


def _load_torchvision(spec: BackboneSpec, path: Path) -> nn.Module:
    state = read_tensors(path)
    fc = state.get("fc.weight")
    model = _build_torchvision(spec, 0 if fc is None else int(fc.shape[0]))
    model.load_state_dict(state)
    return model


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors in a .safetensors or torch file, out of usual wrappers; nothing is executed."""
    from timm.models import load_state_dict

    state = load_state_dict(str(path), weights_only=True)
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise WeightsUnavailable(
            f"weights {path} hold no tensors by name; give a file of a state_dict"
        )
    return tensors


_BUILDERS = {"timm": _build_timm, "open_clip": _build_open_clip, "torchvision": _build_torchvision}
_SOURCES = {
    "timm": _source_timm,
    "open_clip": _source_open_clip,
    "torchvision": _source_torchvision,
}
_LOADERS = {"timm": _load_timm, "open_clip": _load_open_clip, "torchvision": _load_torchvision}
