"""The U-Net's sizes and seeds, and the library's networks by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from raypipe.errors import ConfigError, InputError, UnknownName, WeightsUnavailable
from raypipe.segment import library
from raypipe.segment.model import (
    LibraryConfig,
    UNet,
    UNetConfig,
    build_model,
    checkpoint_blocks,
    record,
    spec_from,
    spec_of,
)


def numbers_by_hand(width: int, depth: int, n_in: int, classes: int) -> int:
    """Weights of a U-Net, from its drawing: two 3x3 convolutions a level and way, norms, joins."""
    n = [width * 2**i for i in range(depth)]

    def double(a: int, b: int) -> int:
        return 9 * a * b + 9 * b * b + 2 * 2 * b

    total = double(n_in, n[0]) + sum(double(n[i - 1], n[i]) for i in range(1, depth))
    for i in range(depth - 1):
        total += 4 * n[i + 1] * n[i] + n[i] + double(2 * n[i], n[i])
    return total + n[0] * classes + classes


@pytest.mark.parametrize(("width", "depth", "n_in", "classes"), [(64, 5, 1, 1), (8, 3, 4, 3)])
def test_the_network_has_the_papers_sizes(width: int, depth: int, n_in: int, classes: int) -> None:
    spec = UNetConfig(in_channels=n_in, classes=classes, width=width, depth=depth)
    with torch.device("meta"):
        model = UNet(spec)
    found = sum(p.numel() for p in model.parameters())
    assert found == numbers_by_hand(width, depth, n_in, classes)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert max(c.out_channels for c in convolutions) == width * 2 ** (depth - 1)


def test_building_leaves_cudas_generators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def seeded(seed: int) -> None:
        raise AssertionError("CUDA's generators were seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded)
    build_model(UNetConfig(width=2, depth=2), 7)


@pytest.mark.parametrize("up", ["transposed", "bilinear"])
def test_equal_seeds_give_equal_bits_whatever_the_process_drew(up: str) -> None:
    spec = UNetConfig(width=4, depth=3, up=up, classes=1, in_channels=2)  # type: ignore[arg-type]
    torch.manual_seed(1)
    model = build_model(spec, 7)
    assert model(torch.zeros(3, 2, 8, 12)).shape == (3, 1, 8, 12)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    first |= dict(build_model(spec, 7).named_buffers())  # the forward moved its own
    torch.rand(1000)
    second = build_model(spec, 7).state_dict()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    other = build_model(spec, 8).state_dict()
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_building_leaves_the_generators_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build_model(UNetConfig(width=4, depth=2), 0)
    assert torch.equal(torch.rand(1), expected)


def test_a_size_that_cannot_be_halved_is_refused_with_the_multiple() -> None:
    model = build_model(UNetConfig(width=2, depth=4))
    with pytest.raises(InputError, match=r"20x24.*multiples of 8"):
        model(torch.zeros(1, 1, 20, 24))


def test_blocks_keep_their_inputs_only() -> None:
    """A level's pooling and joining lie inside: no block is given a pooled or a joined map."""
    model = build_model(UNetConfig(width=4, depth=4))
    given: dict[nn.Module, list[tuple[int, ...]]] = {}
    for block in checkpoint_blocks(model):
        block.register_forward_pre_hook(
            lambda m, args: given.__setitem__(m, [tuple(a.shape) for a in args])
        )
    model(torch.zeros(1, 1, 16, 16))
    shapes = [given[block] for block in checkpoint_blocks(model)]
    assert shapes == [
        [(1, 1, 16, 16)],
        [(1, 4, 16, 16)],
        [(1, 8, 8, 8)],
        [(1, 16, 4, 4)],
        [(1, 32, 2, 2), (1, 16, 4, 4)],
        [(1, 16, 4, 4), (1, 8, 8, 8)],
        [(1, 8, 8, 8), (1, 4, 16, 16)],
    ]


@pytest.mark.parametrize(
    "options",
    [
        *({name: 0} for name in ("width", "depth", "classes", "in_channels")),
        {"up": "nearest"},
        {"dropout": 1.0},
    ],
)
def test_sizes_that_break_their_rule_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        UNetConfig(**options)  # type: ignore[arg-type]


def test_a_spec_is_saved_and_read_as_plain_values() -> None:
    for spec in (
        spec_of("unet", in_channels=2, classes=3, width=8, up="bilinear"),
        spec_of("smp:FPN:resnet18", in_channels=1, classes=2),
    ):
        assert spec_from(json.loads(json.dumps(record(spec)))) == spec
    with pytest.raises(ConfigError, match="another version"):
        spec_from({"model": "unet", "colour": 1})


@pytest.mark.parametrize("word", ["unett", "smp:Unet", "smp", "unet:5"])
def test_an_unknown_model_is_named_with_the_forms(word: str) -> None:
    with pytest.raises(UnknownName, match="smp:NAME:ENCODER"):
        spec_of(word, in_channels=1, classes=1)


def test_our_network_has_no_published_encoder() -> None:
    with pytest.raises(ConfigError, match="imagenet"):
        spec_of("unet", in_channels=1, classes=1, encoder_weights="imagenet")


def test_a_missing_library_is_named_with_the_way_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.setattr(library, "import_module", missing)
    with pytest.raises(ConfigError, match=r"raypipe\[smp\]"):
        build_model(LibraryConfig(architecture="Unet", encoder="resnet18"))


@pytest.fixture
def smp() -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="the smp extra is not installed")


@pytest.mark.usefixtures("smp")
def test_a_library_network_is_seeded_and_takes_an_encoders_file(tmp_path: Path) -> None:
    spec = LibraryConfig(architecture="Unet", encoder="mobilenet_v2", in_channels=1, classes=2)
    torch.manual_seed(0)
    model = build_model(spec, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 2, 32, 32)
    assert len(checkpoint_blocks(model)) == 5

    torch.manual_seed(1)
    colour = library.build_library(replace(spec, in_channels=3)).get_submodule("encoder")
    file = tmp_path / "encoder.pth"
    torch.save(colour.state_dict(), file)
    loaded = build_model(replace(spec, encoder_weights=str(file)), 3).state_dict()
    # One grey channel sees what three equal colour channels would: the sum over the channels.
    first, *others = (name for name, value in colour.state_dict().items() if value.ndim == 4)
    folded = colour.state_dict()[first].sum(1, keepdim=True)
    assert torch.allclose(loaded[f"encoder.{first}"], folded, atol=1e-6)
    for name in others:
        assert torch.equal(loaded[f"encoder.{name}"], colour.state_dict()[name]), name
    for name in (name for name in before if not name.startswith("encoder.")):
        assert torch.equal(loaded[name], before[name]), name


@pytest.mark.usefixtures("smp")
def test_what_the_library_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="nearest: Unet"):
        build_model(LibraryConfig(architecture="Unett", encoder="resnet18"))
    with pytest.raises(UnknownName, match="nearest: resnet"):
        build_model(LibraryConfig(architecture="Unet", encoder="resnet17"))
    spec = {"architecture": "Unet", "encoder": "mobilenet_v2"}
    with pytest.raises(WeightsUnavailable, match=r"published: .*imagenet"):
        build_model(LibraryConfig(**spec, encoder_weights="imagenett"))
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightsUnavailable, match="do not load into encoder mobilenet_v2"):
        build_model(LibraryConfig(**spec, encoder_weights=str(tmp_path / "other.pth")))


@pytest.mark.usefixtures("smp")
def test_without_network_published_weights_say_where_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    spec = LibraryConfig(architecture="Unet", encoder="resnet18", encoder_weights="imagenet")
    with pytest.raises(WeightsUnavailable, match="--encoder-weights FILE"):
        build_model(spec)
