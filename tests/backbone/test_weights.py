"""Weights: the same everywhere when random, whole when from a file, a clear way out when offline."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from raypipe.backbone import resolve
from raypipe.backbone.libraries import build, build_on_meta, load_file, published
from raypipe.backbone.model import digest_of, load
from raypipe.backbone.seeded import _uniform, fill_random
from raypipe.backbone.weights import Hub, Url, locate
from raypipe.errors import ConfigError, WeightsUnavailable

TINY = "timm:vit_tiny_patch16_224"


def saved(path: Path, state: dict[str, Any]) -> str:
    torch.save(state, path)
    return str(path)


# --- random:SEED


def test_random_weights_are_known_numbers() -> None:
    """By hand from NumPy's raw Philox words: no torch generator, no initialiser takes part."""
    import hashlib

    key = np.frombuffer(hashlib.blake2b(b"5:fc.weight", digest_size=16).digest(), "<u8")
    words = np.random.Philox(key=key).random_raw(500)
    halves = [half for word in words.tolist() for half in (word & 0xFFFFFFFF, word >> 32)]
    want = np.array([(half >> 8) / 2**23 - 1 for half in halves], np.float32)
    np.testing.assert_array_equal(_uniform("5:fc.weight", 1000), want)
    np.testing.assert_array_equal(_uniform("5:fc.weight", 999), want[:999])
    model = build(resolve("resnet18"))
    fill_random(model, 5)
    bound = np.float32((3 / 512) ** 0.5)
    np.testing.assert_array_equal(
        model.get_parameter("fc.weight").detach().numpy().ravel()[:1000], want * bound
    )


def test_random_weights_do_not_depend_on_the_process() -> None:
    code = (
        "import sys, torch; torch.manual_seed(int(sys.argv[1])); torch.set_num_threads(int(sys.argv[1]));"
        "from raypipe.backbone import resolve; from raypipe.backbone.model import load;"
        f"print(load(resolve({TINY!r}), weights='random:11').weights_sha256)"
    )
    other = subprocess.run(
        [sys.executable, "-c", code, "2"], check=True, capture_output=True, text=True
    )
    assert other.stdout.strip() == load(resolve(TINY), weights="random:11").weights_sha256


def test_seeds_differ_and_the_global_generator_is_untouched() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    digests = {
        load(resolve("resnet18"), weights=f"random:{seed}").weights_sha256 for seed in (0, 1, 0)
    }
    assert len(digests) == 2
    assert torch.equal(before, torch.random.get_rng_state())


def test_random_keeps_constants_and_gives_usable_activations() -> None:
    model = build(resolve(TINY))
    fill_random(model, 0)
    assert bool((model.get_parameter("norm.weight") == 1).all())
    assert not model.get_parameter("blocks.0.attn.qkv.bias").any()
    batch = torch.randint(0, 256, (4, 224, 224, 3), dtype=torch.uint8)
    for name in ("resnet18", "resnet50", TINY, "timm:resnet10t"):
        (tokens,) = load(resolve(name), weights="random:0")(batch).values()
        assert torch.isfinite(tokens).all()
        assert 0.05 < float(tokens.std()) < 20
        assert float((tokens[0] - tokens[1]).abs().max()) > 0  # pictures differ


@pytest.mark.parametrize(
    "text", ["random", "random:", "random:x", "random:-1", "random:1.5", "random:²"]
)
def test_random_needs_a_seed(text: str) -> None:
    with pytest.raises(ConfigError, match="random:0"):
        load(resolve(TINY), weights=text)


# --- digest


def test_digest_is_of_names_dtypes_shapes_and_bytes() -> None:
    import hashlib

    layer = nn.Linear(2, 1)
    want = hashlib.sha256()
    for name, tensor in (("bias", layer.bias), ("weight", layer.weight)):
        want.update(
            f"{name}|torch.float32|{tuple(tensor.shape)}|".encode()
            + tensor.detach().numpy().tobytes()
        )
    assert digest_of(layer) == want.hexdigest()
    for changed in (layer.double(), nn.BatchNorm2d(3), nn.Linear(2, 1).to(torch.bfloat16)):
        assert digest_of(changed) != want.hexdigest()
    scalar, transposed = nn.BatchNorm1d(2), nn.Linear(3, 2)
    assert digest_of(scalar) == digest_of(scalar)  # holds a 0-d integer tensor
    transposed.weight.data = transposed.weight.data.t().contiguous().t()
    assert digest_of(transposed) == digest_of(transposed)


# --- a file


@pytest.mark.parametrize("name", [TINY, "resnet18", "timm:resnet10t", "open_clip:ViT-S-32"])
@pytest.mark.parametrize("form", [".safetensors", ".pth", "wrapped", "ddp"])
def test_a_file_gives_its_weights(tmp_path: Path, name: str, form: str) -> None:
    spec = resolve(name)
    source = fill_random(build(spec), 42)
    state = {key: value.contiguous() for key, value in source.state_dict().items()}
    path = tmp_path / f"w{form if form.startswith('.') else '.pt'}"
    if form == ".safetensors":
        save_file(state, path)
    elif form == ".pth":
        saved(path, state)
    elif form == "wrapped":
        saved(path, {"epoch": 3, "state_dict": state})
    else:
        saved(path, {f"module.{key}": value for key, value in state.items()})
    assert load(spec, weights=str(path)).weights_sha256 == digest_of(source)


def test_a_file_without_classifier_and_one_with_other_classes(tmp_path: Path) -> None:
    batch = torch.randint(0, 256, (1, 224, 224, 3), dtype=torch.uint8)
    for name, head in ((TINY, "head"), ("resnet18", "fc"), ("timm:resnet10t", "fc")):
        spec = resolve(name)
        state = fill_random(build(spec), 42).state_dict()
        body = {key: value for key, value in state.items() if not key.startswith(head)}
        width = state[f"{head}.weight"].shape[1]
        fewer = body | {f"{head}.weight": torch.zeros(5, width), f"{head}.bias": torch.zeros(5)}
        want = load(spec, weights=saved(tmp_path / "a.pth", state))(batch)
        for other in (body, fewer):
            got = load(spec, weights=saved(tmp_path / "b.pth", other))(batch)
            for key in want:
                torch.testing.assert_close(got[key], want[key], rtol=0, atol=0)


def test_the_original_dinov2_release_loads(tmp_path: Path) -> None:
    """Its keys (a mask token besides) and positions for another image size, through timm's filter."""
    spec = resolve("dinov2_q")
    model = fill_random(build(spec), 1)
    state = dict(model.state_dict())
    released = tmp_path / "dinov2_vitb14_pretrain.pth"
    saved(released, state | {"mask_token": torch.zeros(1, 768)})
    assert digest_of(load_file(spec, released)) == digest_of(model)
    saved(
        released,
        state
        | {"mask_token": torch.zeros(1, 768), "pos_embed": state["pos_embed"][:, : 1 + 16 * 16]},
    )
    resized = load_file(spec, released)
    assert resized.get_parameter("pos_embed").shape == (1, 1370, 768)
    torch.testing.assert_close(resized.get_parameter("pos_embed")[:, 0], state["pos_embed"][:, 0])


def test_a_whole_clip_checkpoint_gives_its_vision_part(tmp_path: Path) -> None:
    spec = resolve("open_clip:ViT-S-32")
    vision = fill_random(build(spec), 4)
    whole = {f"visual.{key}": value for key, value in vision.state_dict().items()}
    whole |= {"text_projection": torch.zeros(384, 384), "logit_scale": torch.zeros(())}
    path = saved(tmp_path / "clip.pt", {"state_dict": whole})
    assert load(spec, weights=path).weights_sha256 == digest_of(vision)
    larger = load_file(resolve("open_clip:ViT-S-32", image_size=256), Path(path))
    assert larger.get_parameter("positional_embedding").shape == (1 + 8 * 8, 384)


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/raypipe-evil"),))


@pytest.mark.parametrize("name", [TINY, "resnet18", "open_clip:ViT-S-32"])
def test_files_that_do_not_fit(tmp_path: Path, name: str) -> None:
    spec = resolve(name)
    state = dict(build(spec).state_dict())
    first, *_ = (
        key
        for key in sorted(state)
        if key.endswith("weight") and "head" not in key and "fc." not in key
    )
    lacking = {key: value for key, value in state.items() if key != first}
    path = tmp_path / "w.pth"
    for wrong, says in (
        (lacking, f"missing key '{first}' (of 1)"),
        (state | {"what.is.this": torch.zeros(1)}, "unexpected key 'what.is.this' (of 1)"),
        (state | {first: torch.zeros(3, 3)}, first),
        ({"nothing": torch.zeros(1)}, "missing key"),
        ({"epoch": 3}, "no tensors"),
        ({}, "w.pth"),
        ([torch.zeros(1)], "w.pth"),
        (state | {"x": Evil()}, "more than tensors"),
    ):
        saved(path, wrong)
        with pytest.raises(WeightsUnavailable) as caught:
            load(spec, weights=str(path))
        text = str(caught.value)
        assert says in text, text
        assert "\n" not in text
        assert len(text) < 600
    assert not Path("/tmp/raypipe-evil").exists()


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    spec = resolve(TINY)
    good = tmp_path / "good.pth"
    saved(good, dict(build(spec).state_dict()))
    for name, data in (
        ("empty.pth", b""),
        ("text.pth", b"hello"),
        ("cut.pth", good.read_bytes()[:100_000]),
        ("empty.safetensors", b""),
        ("huge.safetensors", b"\xff" * 64),
        ("zip.pt", b"PK\x03\x04" + bytes(40)),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(WeightsUnavailable, match=name) as caught:
            load(spec, weights=str(tmp_path / name))
        assert "\n" not in str(caught.value)
    for text in (str(tmp_path), str(tmp_path / "none.pth"), "pretraind", ""):
        with pytest.raises(WeightsUnavailable, match="random:SEED"):
            load(spec, weights=text)


def test_a_torchscript_archive_is_named_as_such(tmp_path: Path) -> None:
    """OpenAI's own .pt files are such archives, and hold code."""
    path = tmp_path / "ViT-L-14.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to give TorchScript up
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)
    with pytest.raises(WeightsUnavailable, match="TorchScript archive"):
        load(resolve("open_clip:ViT-S-32"), weights=str(path))


# --- pretrained


def test_where_published_weights_are() -> None:
    assert published(resolve("dinov2_q")) == Hub(
        repo="timm/vit_base_patch14_dinov2.lvd142m",
        files=("model.safetensors", "pytorch_model.bin"),
    )
    assert published(resolve("clip")) == Hub(
        repo="timm/vit_large_patch14_clip_224.openai",
        files=("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    )
    resnet = published(resolve("resnet18"))
    assert isinstance(resnet, Url)
    assert resnet.url.endswith("resnet18-f37072fd.pth")
    with pytest.raises(WeightsUnavailable, match="random:SEED"):
        published(resolve("timm:vit_small_patch16_36x1_224"))


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No cached weights; the hub is not to be reached, nor is anything else."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    return tmp_path


@pytest.mark.parametrize("name", ["dinov2_q", "clip"])
def test_without_network_the_remedy_is_quick_and_named(empty_home: Path, name: str) -> None:
    start = time.monotonic()
    with pytest.raises(WeightsUnavailable, match="--weights FILE") as caught:
        load(resolve(name), weights="pretrained")
    assert time.monotonic() - start < 15
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_silent_network_is_given_up_soon(
    empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that accepts and never answers, which the hub's client would ask again and again."""
    import socket

    from huggingface_hub import constants

    from raypipe.backbone import weights

    monkeypatch.setattr(weights, "_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        for source in (
            Hub(repo="a/b", files=("x.safetensors", "x.bin")),
            Url(url=f"{address}/x-0123456789.pth"),
        ):
            start = time.monotonic()
            with pytest.raises(WeightsUnavailable, match="--weights FILE"):
                locate(source, "x")
            assert time.monotonic() - start < 5
    assert socket.getdefaulttimeout() is None


def test_a_cached_file_needs_no_network(empty_home: Path) -> None:
    spec = resolve("resnet18")
    model = fill_random(build(spec), 9)
    folder = empty_home / "torch" / "checkpoints"
    folder.mkdir(parents=True)
    saved(folder / "resnet18-f37072fd.pth", dict(model.state_dict()))
    assert load(spec, weights="pretrained").weights_sha256 == digest_of(model)

    tiny = resolve(TINY)
    repo = f"models--timm--{tiny.arch}"
    snapshot = empty_home / "hub" / repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (empty_home / "hub" / repo / "refs").mkdir()
    (empty_home / "hub" / repo / "refs" / "main").write_text("0" * 40)
    model = fill_random(build(tiny), 9)
    save_file(dict(model.state_dict()), snapshot / "model.safetensors")
    assert load(tiny, weights="pretrained").weights_sha256 == digest_of(model)


def test_offline_switch_is_obeyed(empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsUnavailable, match="HF_HUB_OFFLINE"):
        load(resolve("dinov2_q"), weights="pretrained")


def test_models_are_built_without_memory_on_meta() -> None:
    model = build_on_meta(resolve("clip"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
