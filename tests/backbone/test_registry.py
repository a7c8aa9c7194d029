"""Names to specs: the folders users have, the declared numbers, and errors with the nearest names."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest

from raypipe.backbone import BackboneSpec, LayerSpec, Preprocess, names, resolve
from raypipe.backbone.model import layouts, shapes
from raypipe.backbone.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from raypipe.errors import ConfigError, InputError, UnknownName

NAMED = ["dinov2_q", "dinov2_k", "dinov2_v", "dinov2", "clip", "resnet18", "resnet50"]
SHAPES = {"clip": (257, 768), "resnet18": (49, 512), "resnet50": (49, 2048)}


@pytest.mark.parametrize(
    ("name", "options", "folder"),
    [
        ("dinov2_q", {}, "dinov2_q_last"),
        ("dinov2_q", {"enc_layer": 11}, "dinov2_q_last"),
        ("dinov2_q", {"enc_layer": -2}, "dinov2_q_10"),
        ("dinov2_k", {"enc_layer": 0}, "dinov2_k_0"),
        ("dinov2", {}, "dinov2_last"),
        ("dinov2", {"enc_layer": 5}, "dinov2_5"),
        ("clip", {}, "clip_vit_512"),
        ("clip", {"enc_layer": 3}, "clip_vit_512_3"),
        ("resnet18", {}, "resnet18_layer4"),
        ("resnet50", {"enc_layer": 1}, "resnet50_layer2"),
        ("timm:resnet10t", {}, "timm-resnet10t_features"),
        ("timm:vit_tiny_patch16_224", {"enc_layer": -2}, "timm-vit_tiny_patch16_224_10"),
        ("open_clip:ViT-B-32", {}, "open_clip-ViT-B-32_last"),
        ("open_clip:ViT-B-32", {"enc_layer": 4}, "open_clip-ViT-B-32_4"),
        ("open_clip:ViT-B-32@openai", {}, "open_clip-ViT-B-32-openai_last"),
        ("open_clip:RN50", {}, "open_clip-RN50_layer4"),
    ],
)
def test_folders(name: str, options: dict[str, int], folder: str) -> None:
    spec = resolve(name, **options)
    assert [spec.folder(layer.key) for layer in spec.layers] == [folder]


@pytest.mark.parametrize("name", NAMED)
def test_declared_numbers_are_the_models_own(name: str) -> None:
    spec = resolve(name)
    (layer,) = spec.layers
    layout = layouts(spec, (425, 425))[layer.key]
    assert (layout.n_tokens, layout.dim) == SHAPES.get(name, (962, 768))
    assert layout.dim == layer.dim
    assert layout.grid is not None
    rows, columns = layout.grid
    assert layout.n_tokens == layout.n_prefix + rows * columns
    assert layout.n_prefix == (0 if name.startswith("resnet") else 1)
    json.dumps([spec.identity(layer.key), layout.describe()])
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert hash(spec) == hash(resolve(name))


def test_table_names_them_all() -> None:
    assert [row.name for row in names()] == [*NAMED, "timm:NAME", "open_clip:NAME[@TAG]"]


def test_sizes_follow_the_picture() -> None:
    assert shapes(resolve("dinov2_q"), (224, 224)) == {"last": (257, 768)}
    assert shapes(resolve("dinov2_q"), (300, 425)) == {"last": (1 + 22 * 31, 768)}
    assert layouts(resolve("dinov2_q"), (300, 425))["last"].grid == (22, 31)
    assert shapes(resolve("dinov2_q", image_size=224), (300, 425)) == {"last": (257, 768)}
    assert shapes(resolve("clip", image_size=336), (300, 425)) == {"last": (1 + 24 * 24, 768)}
    assert shapes(resolve("resnet18", image_size=256), (300, 425)) == {"layer4": (64, 512)}
    assert shapes(resolve("timm:vit_tiny_patch16_224", image_size=384), (9, 9)) == {
        "features": (577, 192)
    }


def test_several_layers_at_once() -> None:
    spec = resolve(
        "timm:vit_tiny_patch16_224",
        layers=["blocks.3", "blocks.3.attn.qkv:q", "blocks.3.attn.qkv", "head", "norm"],
    )
    assert shapes(spec, (224, 224)) == {
        "blocks.3": (197, 192),
        "blocks.3.attn.qkv-q": (197, 192),
        "blocks.3.attn.qkv": (197, 576),
        "head": (1, 1000),
        "norm": (197, 192),
    }
    assert spec.folder("blocks.3.attn.qkv-q") == "timm-vit_tiny_patch16_224_blocks.3.attn.qkv-q"
    spec = resolve("clip", layers=["visual.transformer.resblocks.2"])
    assert [layer.module for layer in spec.layers] == ["transformer.resblocks.2"]


def test_maps_of_either_memory_order() -> None:
    assert layouts(resolve("timm:swin_tiny_patch4_window7_224"), (9, 9))["features"].grid == (7, 7)
    spec = resolve("timm:swin_tiny_patch4_window7_224", layers=["layers.1", "patch_embed.proj"])
    assert shapes(spec, (9, 9)) == {"layers.1": (784, 192), "patch_embed.proj": (3136, 96)}
    assert shapes(resolve("timm:convnext_atto", layers=["stages.2"]), (9, 9)) == {
        "stages.2": (196, 160)
    }


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("dinov3", "dinov2"),
        ("dinov2_", "dinov2"),
        ("dinov2_qq", "dinov2_q"),
        ("CLIP", "nearest"),
        ("", "nearest"),
        ("timm:", "timm:NAME"),
        ("timm:vit_bse_patch16_224", "timm:vit_base_patch16_224"),
        ("timm:vit_base_patch16_224.nope", r"timm:vit_base_patch16_224\.[a-z]"),
        ("vit_base_patch16_224", "timm:vit_base_patch16_224"),
        ("open_clip:ViT-L14", "open_clip:ViT-L-14"),
        ("open_clip:ViT-L-14@openal", "openai"),
        ("timm:hf-hub:some/thing", "nearest"),
        ("timm:../../x", "nearest"),
    ],
)
def test_unknown_backbone_offers_the_nearest(name: str, near: str) -> None:
    with pytest.raises(UnknownName, match=near) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


def test_unknown_layer_offers_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"blocks\.1"):
        resolve("timm:vit_tiny_patch16_224", layers=["block.11"])
    with pytest.raises(UnknownName, match="part"):
        resolve("timm:vit_tiny_patch16_224", layers=["blocks.1.attn.qkv:w"])
    with pytest.raises(ConfigError, match="fused qkv"):
        resolve("timm:vit_tiny_patch16_224", layers=["blocks.1:q"])
    with pytest.raises(ConfigError, match="each once"):
        resolve("timm:vit_tiny_patch16_224", layers=["blocks.1", "blocks.1"])
    with pytest.raises(UnknownName, match="last"):
        resolve("clip").folder("first")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dinov2_q", {"enc_layer": 12}),
        ("dinov2_q", {"enc_layer": -13}),
        ("clip", {"enc_layer": 24}),
        ("resnet18", {"enc_layer": 4}),
        ("timm:vit_tiny_patch16_224", {"enc_layer": 12}),
        ("timm:resnet10t", {"enc_layer": 1}),  # has no list of blocks
        ("dinov2", {"enc_layer": 1, "layers": ["blocks.2"]}),
        ("dinov2_q", {"layers": ["blocks.2"]}),
        ("dinov2", {"image_size": 0}),
        ("dinov2", {"image_size": 10**6}),
    ],
)
def test_values_outside_of_their_rule(name: str, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(name, **options)
    assert "\n" not in str(caught.value)


def test_a_size_the_model_cannot_take() -> None:
    for name in ("timm:vit_tiny_patch16_224", "clip", "open_clip:ViT-B-32"):
        with pytest.raises(ConfigError, match="patch of"):  # the last pixels would be dropped
            shapes(resolve(name, image_size=230), (9, 9))
        with pytest.raises(InputError):
            shapes(resolve(name, image_size=8), (9, 9))
    with pytest.raises(InputError, match="image-size"):
        shapes(resolve("timm:vit_tiny_patch16_224", layers=["blocks.0"]), (9, 9)) and shapes(
            resolve("timm:coat_mini", image_size=8), (9, 9)
        )


def test_whose_mean_and_std() -> None:
    assert (resolve("clip").preprocess.mean, resolve("clip").preprocess.std) == (
        CLIP_MEAN,
        CLIP_STD,
    )
    older = resolve("clip", preprocess="imagenet").preprocess
    assert (older.mean, older.std, older.crop) == (IMAGENET_MEAN, IMAGENET_STD, 224)
    assert resolve("dinov2", preprocess="clip").preprocess.pad_multiple == 14
    with pytest.raises(UnknownName, match="imagenet"):
        resolve("clip", preprocess="imagenet1k")  # type: ignore[arg-type]


def test_quick_gelu_is_the_weights_own() -> None:
    """OpenAI's weights need it, LAION's must not have it, whatever the configuration's name says."""
    quick = {
        name: dict(resolve(name).options)["quick_gelu"] for name in ("clip", "open_clip:ViT-L-14")
    }
    assert quick == {"clip": True, "open_clip:ViT-L-14": True}
    assert dict(resolve("open_clip:ViT-L-14@laion2b_s32b_b82k").options)["quick_gelu"] is False


def test_identity_tells_configurations_apart() -> None:
    specs = [
        resolve("dinov2_q"),
        resolve("dinov2_k"),
        resolve("dinov2_q", enc_layer=3),
        resolve("dinov2_q", image_size=224),
        resolve("dinov2_q", preprocess="clip"),
        resolve("clip"),
        resolve("clip", preprocess="imagenet"),
    ]
    seen = {json.dumps(spec.identity(spec.layers[0].key), sort_keys=True) for spec in specs}
    assert len(seen) == len(specs)
    same = resolve("dinov2_q", enc_layer=11)
    assert same.identity("last") == resolve("dinov2_q").identity("last")


def test_specs_check_themselves() -> None:
    layer = LayerSpec(key="a", module="b", folder="c")
    with pytest.raises(ConfigError, match="no layer"):
        BackboneSpec(name="x", library="timm", arch="y", layers=(), preprocess=Preprocess())
    with pytest.raises(ConfigError, match="each once"):
        BackboneSpec(
            name="x", library="timm", arch="y", layers=(layer, layer), preprocess=Preprocess()
        )
    for folder in ("../x", "a/b", "", ".hidden", "a b"):
        with pytest.raises(ConfigError):
            LayerSpec(key="a", module="b", folder=folder)


def test_importing_and_resolving_a_named_backbone_loads_no_torch() -> None:
    code = (
        "import sys; from raypipe.backbone import resolve; import raypipe.read; "
        "[resolve(n) for n in ('dinov2_q', 'clip', 'resnet18')]; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
