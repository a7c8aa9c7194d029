"""Names -> specs: what each backbone is, and what it wants its pixels to be.

Nothing here is guessed: preprocessing comes from the model's own publication, by this table or by
the library's configuration of those very weights; where that says something raypipe does not do,
it is refused. The named backbones resolve without importing torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from raypipe.backbone.from_library import open_clip_spec, timm_spec
from raypipe.backbone.layers import block_index, block_of, chosen_layers
from raypipe.backbone.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Preprocess
from raypipe.backbone.spec import BackboneSpec, LayerSpec, Part, sorted_options
from raypipe.errors import ConfigError, UnknownName

PreprocessName = Literal["default", "imagenet", "clip"]
_DINOV2 = "vit_base_patch14_dinov2.lvd142m"
_RESNETS = {"resnet18": 512, "resnet50": 2048}


class Row(NamedTuple):
    """One line of the table that help and README show."""

    name: str
    what: str
    shape: str


def names() -> tuple[Row, ...]:
    """The backbones, for help and docs."""
    dinov2 = "[N, 962, 768] at 425 -> 434 pixels"
    return (
        *(
            Row(f"dinov2_{part}", f"DINOv2 ViT-B/14, {what} of the attention, CLS first", dinov2)
            for part, what in (("q", "queries"), ("k", "keys"), ("v", "values"))
        ),
        Row("dinov2", "DINOv2 ViT-B/14, tokens after the final norm, CLS first", dinov2),
        Row("clip", "CLIP ViT-L/14, projected tokens, CLS first", "[N, 257, 768]"),
        Row("resnet18", "ResNet-18, layer4 map as tokens", "[N, 49, 512] at 224 pixels"),
        Row("resnet50", "ResNet-50, layer4 map as tokens", "[N, 49, 2048] at 224 pixels"),
        Row("timm:NAME", "any timm model; --layer MODULE.PATH", "by model"),
        Row("open_clip:NAME[@TAG]", "any open_clip vision model; --layer MODULE.PATH", "by model"),
    )


def resolve(
    name: str,
    *,
    enc_layer: int = -1,
    layers: Sequence[str] = (),
    preprocess: PreprocessName = "default",
    image_size: int | None = None,
) -> BackboneSpec:
    """The spec of backbone ``name``.

    enc_layer : which block's tokens, counted from the end when negative
    layers : module paths to take instead, e.g. "blocks.3", "blocks.3.attn.qkv:q"
    preprocess : whose mean and std to normalise with; sizes stay the model's own
    image_size : pixels; resize the shorter side to this and crop the centre square

    Raises UnknownName for a backbone or module path that does not exist (with the nearest names),
    ConfigError for values outside of their rule.
    """
    if image_size is not None and not 8 <= image_size <= 4096:
        raise ConfigError(f"image size {image_size} is not in 8..4096 pixels; choose one, e.g. 224")
    if layers and enc_layer != -1:
        raise ConfigError(
            f"enc-layer {enc_layer} and layers {', '.join(layers)} are both given; give one"
        )
    library, _, arch = name.partition(":")
    if library == "timm" and arch:
        spec = timm_spec(name, arch, image_size)
    elif library == "open_clip" and arch:
        spec = open_clip_spec(name, arch, image_size)
    else:
        spec = _named(name, enc_layer, image_size, with_layers=bool(layers))
    spec = replace(spec, preprocess=_renormalised(spec.preprocess, preprocess))
    if layers:
        return replace(spec, layers=chosen_layers(spec, layers))
    if library in ("timm", "open_clip") and arch and enc_layer != -1:
        return replace(spec, layers=(block_of(spec, enc_layer),))
    return spec


def _named(name: str, enc_layer: int, image_size: int | None, *, with_layers: bool) -> BackboneSpec:
    """The spec of a backbone in this file's own table."""
    part = name.partition("_")[2]
    if name in ("dinov2", "dinov2_q", "dinov2_k", "dinov2_v"):
        if part and with_layers:
            raise ConfigError(f"backbone {name} names its own part; use dinov2 with --layer")
        return _dinov2(name, part, enc_layer, image_size)
    if name == "clip":
        return _clip(enc_layer, image_size)
    if name in _RESNETS:
        return _resnet(name, enc_layer, image_size)
    raise _unknown(name)


def _unknown(name: str) -> UnknownName:
    """The error for ``name``, offering timm's names too: a bare timm name is the likeliest slip."""
    import timm

    known = [row.name for row in names() if ":" not in row.name]
    hint = f"timm models are written timm:NAME, as timm:{name}" if timm.is_model(name) else ""
    return UnknownName.of("backbone", name, [*known, "timm:NAME", "open_clip:NAME"], hint)


def _dinov2(name: str, part: str, enc_layer: int, image_size: int | None) -> BackboneSpec:
    """DINOv2 ViT-B/14: by default unresized and padded to whole patches, as Algonauts models do."""
    block, key = block_index(enc_layer, 12)
    module = f"blocks.{block}.attn.qkv" if part else f"blocks.{block}"
    kind: Part = part if part else "norm"  # type: ignore[assignment]
    return BackboneSpec(
        name=name,
        library="timm",
        arch=_DINOV2,
        layers=(LayerSpec(key=key, module=module, part=kind, folder=f"{name}_{key}", dim=768),),
        preprocess=Preprocess(resize=image_size, crop=image_size, pad_multiple=14),
        patch_size=14,
        options=(("dynamic_img_size", True),),
    )


def _clip(enc_layer: int, image_size: int | None) -> BackboneSpec:
    """OpenAI's CLIP ViT-L/14; users' folders are called "clip_vit_512", though dim is 768."""
    block, key = block_index(enc_layer, 24)
    folder = "clip_vit_512" if key == "last" else f"clip_vit_512_{key}"
    size = image_size or 224
    layer = LayerSpec(
        key=key, module=f"transformer.resblocks.{block}", part="clip", folder=folder, dim=768
    )
    return BackboneSpec(
        name="clip",
        library="open_clip",
        arch="ViT-L-14",
        tag="openai",
        layers=(layer,),
        preprocess=Preprocess(resize=size, crop=size, mean=CLIP_MEAN, std=CLIP_STD),
        patch_size=14,
        # OpenAI trained with quick GELU; the configuration "ViT-L-14" alone does not say so.
        options=sorted_options(
            {"quick_gelu": True} | ({"image_size": size} if size != 224 else {})
        ),
    )


def _resnet(name: str, enc_layer: int, image_size: int | None) -> BackboneSpec:
    """torchvision's ResNets with the V1 weights, those of the literature on brain encoding."""
    layer = f"layer{block_index(enc_layer, 4)[0] + 1}"
    dim = _RESNETS[name] // 2 ** (4 - int(layer[-1]))
    resize, crop = (image_size, image_size) if image_size else (256, 224)
    return BackboneSpec(
        name=name,
        library="torchvision",
        arch=name,
        tag="IMAGENET1K_V1",
        layers=(LayerSpec(key=layer, module=layer, folder=f"{name}_{layer}", dim=dim),),
        preprocess=Preprocess(resize=resize, crop=crop, interpolation="bilinear"),
    )


def _renormalised(preprocess: Preprocess, whose: str) -> Preprocess:
    """``preprocess`` with ImageNet's or CLIP's mean and std; sizes stay."""
    if whose == "default":
        return preprocess
    if whose == "imagenet":
        return replace(preprocess, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    if whose == "clip":
        return replace(preprocess, mean=CLIP_MEAN, std=CLIP_STD)
    raise UnknownName.of("preprocessing", whose, ("default", "imagenet", "clip"))
