"""Specs of any timm or open_clip model, as the configuration of its weights declares them.

Where a configuration asks for what raypipe does not do (borders, other channels, Lanczos), it is
refused. The backbones with names of their own are in ``registry``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from raypipe.backbone.preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from raypipe.backbone.spec import BackboneSpec, LayerSpec, Option, layer_folder, sorted_options
from raypipe.errors import ConfigError, UnknownName


def timm_spec(name: str, arch: str, image_size: int | None) -> BackboneSpec:
    """Any timm model, preprocessed as the configuration of its weights says."""
    import timm
    from timm.models import get_pretrained_cfg

    if not timm.is_model(arch):
        known = [f"timm:{model}" for model in timm.list_models()]
        raise UnknownName.of("backbone", name, known, "timm.list_models() names them all")
    try:
        cfg = get_pretrained_cfg(arch)
    except RuntimeError:
        stem = arch.partition(".")[0]
        tagged = [
            f"timm:{model}" for model in timm.list_pretrained() if model.partition(".")[0] == stem
        ]
        raise UnknownName.of(
            "backbone", name, tagged, "the part after the dot names the weights"
        ) from None
    if cfg is None:
        raise ConfigError(
            f"timm:{arch} declares no preprocessing; choose a model with a configuration"
        )
    options: dict[str, Option] = {}
    if image_size and cfg.fixed_input_size:
        options["img_size"] = image_size
    return BackboneSpec(
        name=name,
        library="timm",
        arch=f"{arch.partition('.')[0]}.{cfg.tag}" if cfg.tag else arch,
        layers=(
            LayerSpec(
                key="features", module="", part="features", folder=layer_folder(name, "features")
            ),
        ),
        preprocess=_timm_preprocess(name, cfg, image_size),
        options=sorted_options(options),
    )


def _timm_preprocess(name: str, cfg: Any, image_size: int | None) -> Preprocess:
    """timm's evaluation transform for a pretrained configuration; refuses what that is not."""
    channels, height, width = cfg.input_size
    remedy = (
        "choose --image-size to state the size yourself"
        if channels == 3
        else "choose another model"
    )
    if channels != 3 or (image_size is None and (height != width or cfg.crop_mode == "border")):
        raise ConfigError(
            f"{name} wants {channels}x{height}x{width} inputs, crop mode {cfg.crop_mode!r}; "
            f"raypipe feeds square RGB without borders: {remedy}"
        )
    size = image_size or height
    return Preprocess(
        resize=size if image_size else math.floor(size / cfg.crop_pct),
        crop=size,
        interpolation=_interpolation(name, cfg.interpolation),
        squash=cfg.crop_mode == "squash",
        mean=_rgb(cfg.mean),
        std=_rgb(cfg.std),
    )


def open_clip_spec(name: str, arch: str, image_size: int | None) -> BackboneSpec:
    """Any open_clip vision tower; ``@TAG`` says which weights, and with them which activation."""
    import open_clip

    arch, _, tag = arch.partition("@")
    config = open_clip.get_model_config(arch) if arch in open_clip.list_models() else None
    if config is None:
        raise UnknownName.of(
            "backbone", name, [f"open_clip:{model}" for model in open_clip.list_models()]
        )
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if tag and tag not in tags:
        raise UnknownName.of("weights tag", tag, tags, f"the tags of open_clip:{arch}")
    tag = tag or ("openai" if "openai" in tags else tags[0] if tags else "")
    published = open_clip.get_pretrained_cfg(arch, tag) or {}
    vision = config["vision_cfg"]
    side = image_size or published.get("size") or vision.get("image_size", 224)
    if not isinstance(side, int) or published.get("resize_mode") == "longest":
        raise ConfigError(
            f"{name} wants inputs of {side} pixels, resize mode {published.get('resize_mode')!r}; "
            "raypipe feeds squares without borders: choose --image-size to state the size yourself"
        )
    options: dict[str, Option] = {
        "quick_gelu": bool(published.get("quick_gelu", config.get("quick_gelu", False)))
    }
    if side != vision.get("image_size", 224):
        options["image_size"] = side
    return BackboneSpec(
        name=name,
        library="open_clip",
        arch=arch,
        tag=tag,
        layers=(_open_clip_layer(name, vision),),
        preprocess=Preprocess(
            resize=side,
            crop=side,
            interpolation=_interpolation(name, published.get("interpolation") or "bicubic"),
            squash=published.get("resize_mode") == "squash",
            mean=_rgb(published.get("mean") or CLIP_MEAN),
            std=_rgb(published.get("std") or CLIP_STD),
        ),
        patch_size=None if "timm_model_name" in vision else vision.get("patch_size"),
        options=sorted_options(options),
    )


def _open_clip_layer(name: str, vision: dict[str, Any]) -> LayerSpec:
    """The tower's natural output, tokens where it has them: as clip's for plain ViTs."""
    if "timm_model_name" in vision:
        return LayerSpec(
            key="features", module="", part="features", folder=layer_folder(name, "features")
        )
    if isinstance(vision.get("layers"), list):  # a ResNet
        return LayerSpec(key="layer4", module="layer4", folder=layer_folder(name, "layer4"))
    # With attention pooling, or a norm after pooling, ln_post and proj are not made for tokens.
    plain = not vision.get("attentional_pool") and not vision.get("final_ln_after_pool")
    return LayerSpec(
        key="last",
        module=f"transformer.resblocks.{vision['layers'] - 1}",
        part="clip" if plain else "out",
        folder=layer_folder(name, "last"),
    )


def _interpolation(name: str, value: str) -> Literal["bicubic", "bilinear"]:
    if value == "bicubic":
        return "bicubic"
    if value == "bilinear":
        return "bilinear"
    raise ConfigError(
        f"{name} wants {value!r} interpolation; raypipe does bicubic and bilinear: "
        "choose another model"
    )


def _rgb(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
