"""The encoders against forwards written out by hand; positions and readouts against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from raypipe.encoding.config import ModelConfig
from raypipe.encoding.model import TokenScaler, TransformerEncoder, build_encoder
from raypipe.encoding.positions import sine_positions
from raypipe.encoding.readout import MaskedReadout, Readout, build_readout
from raypipe.encoding.shapes import TokenShape
from raypipe.errors import ConfigError, InputError, UnknownName

SHAPE = TokenShape(prefix=2, height=3, width=4, dim=10)
SMALL = ModelConfig(d_model=16, heads=4, ffn=24, layers=2, dropout=0.3)


def toy_readout(seed: int = 0, n: int = 13) -> Readout:
    rng = np.random.default_rng(seed)
    rois = {hemi: {f"R{i}": rng.random(n) < 0.4 for i in range(4)} for hemi in ("lh", "rh")}
    rois["rh"]["R2"][:] = False
    return build_readout("rois_all", rois, {"lh": n, "rh": n})


def vertex_weight(layer: nn.Module) -> Tensor:
    """A MaskedReadout's weights in vertex order, (V, dim)."""
    return layer.weight.index_select(0, layer.restore)


# ---- positions


def test_positions_by_the_formula() -> None:
    height, width, dim = 3, 5, 16
    got = sine_positions(height, width, dim).reshape(height, width, dim)
    for y in range(height):
        for x in range(width):
            for half, place in ((0, (y + 1) / height), (1, (x + 1) / width)):
                for i in range(dim // 2):
                    angle = 2 * math.pi * place / 10_000 ** (2 * (i // 2) / (dim // 2))
                    want = math.sin(angle) if i % 2 == 0 else math.cos(angle)
                    assert float(got[y, x, half * dim // 2 + i]) == pytest.approx(want, abs=1e-6)


def test_positions_are_distinct_and_refuse_odd_widths() -> None:
    table = sine_positions(31, 31, 64)
    assert torch.cdist(table, table).fill_diagonal_(9).min() > 1e-3
    with pytest.raises(ConfigError, match="multiple of 4"):
        sine_positions(3, 3, 18)


# ---- readouts


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 2**31))
def test_masked_readout_is_the_dense_one(n_queries: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((n_queries, n)) < 0.4
    mask[0] |= ~mask.any(0)
    torch.manual_seed(seed)
    layer = MaskedReadout(mask, 5).double()
    nn.init.normal_(layer.bias)
    tokens = torch.randn(3, n_queries, 5, dtype=torch.float64, requires_grad=True)
    weight = vertex_weight(layer).detach().requires_grad_()
    dense = torch.einsum("bqd,vd->bqv", tokens, weight) + layer.bias
    want = (dense * torch.from_numpy(mask)).sum(1)
    got = layer(tokens)
    torch.testing.assert_close(got, want)
    grad = torch.randn_like(want)
    want_tokens, want_weight, want_bias = torch.autograd.grad(
        want, (tokens, weight, layer.bias), grad
    )
    got_tokens, got_weight, got_bias = torch.autograd.grad(
        got, (tokens, layer.weight, layer.bias), grad
    )
    torch.testing.assert_close(got_tokens, want_tokens)
    torch.testing.assert_close(got_weight[layer.restore], want_weight)
    torch.testing.assert_close(got_bias, want_bias)


def test_rois_all_names_each_query_and_covers_each_vertex() -> None:
    rois = {
        "lh": {"V1v": np.array([1, 1, 0, 0], bool), "EBA": np.array([0, 1, 0, 0], bool)},
        "rh": {"V1v": np.array([1, 0, 1], bool), "EBA": np.array([0, 0, 0], bool)},
    }
    readout = build_readout("rois_all", rois, {"lh": 4, "rh": 3})
    assert readout.queries == ("lh V1v", "lh EBA", "lh none", "rh V1v", "rh none")
    np.testing.assert_array_equal(readout.masks["lh"][2], [0, 0, 1, 1])
    np.testing.assert_array_equal(readout.masks["rh"], [[1, 0, 1], [0, 1, 0]])


def test_no_query_for_none_when_rois_cover_all_and_one_when_there_are_no_rois() -> None:
    full = {hemi: {"A": np.ones(3, bool)} for hemi in ("lh", "rh")}
    assert build_readout("rois_all", full, {"lh": 3, "rh": 3}).queries == ("lh A", "rh A")
    bare = build_readout("rois_all", {}, {"lh": 3, "rh": 2})
    assert bare.queries == ("lh none", "rh none")


def test_hemis_feeds_all_and_unknown_readouts_are_named() -> None:
    readout = build_readout("hemis", {}, {"lh": 3, "rh": 2})
    assert readout.queries == ("lh", "rh") and readout.masks["rh"].shape == (1, 2)
    with pytest.raises(UnknownName, match="rois_all"):
        build_readout("roi_all", {}, {"lh": 3, "rh": 2})


def test_a_vertex_without_query_is_refused() -> None:
    masks = {"lh": np.array([[1, 0, 1]], bool), "rh": np.ones((1, 2), bool)}
    with pytest.raises(InputError, match="vertex 1 is fed by no query"):
        Readout(("lh", "rh"), masks)


# ---- the transformer


def by_hand(model: TransformerEncoder, tokens: Tensor, readout: Readout) -> dict[str, Tensor]:
    """The encoder's equations with matrix products and softmax only."""
    state = {name: value.double() for name, value in model.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
        return (x - mean) / torch.sqrt(var + 1e-5) * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    patches = (tokens[:, model.prefix :].double() - state["scaler.mean"]) * state["scaler.scale"]
    memory = linear(patches, "project") if "project.weight" in state else patches
    place = sine_positions(SHAPE.height, SHAPE.width, SMALL.d_model).double()
    target = torch.zeros(len(tokens), len(readout.queries), SMALL.d_model).double()
    for i in range(SMALL.layers):
        name = f"blocks.{i}"
        w = state[f"{name}.attention.in_proj_weight"].chunk(3)
        b = state[f"{name}.attention.in_proj_bias"].chunk(3)
        asked = norm(target, f"{name}.norm_attention") + state["query"]
        q, k, v = asked @ w[0].T + b[0], (memory + place) @ w[1].T + b[1], memory @ w[2].T + b[2]
        read = torch.empty_like(q)
        size = SMALL.d_model // SMALL.heads
        for head in range(SMALL.heads):
            part = slice(head * size, (head + 1) * size)
            score = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
            read[..., part] = torch.softmax(score, -1) @ v[..., part]
        target = target + linear(read, f"{name}.attention.out_proj")
        hidden = torch.relu(linear(norm(target, f"{name}.norm_ffn"), f"{name}.expand"))
        target = target + linear(hidden, f"{name}.contract")
    out, at = norm(target, "norm"), 0
    found = {}
    for hemi in ("lh", "rh"):
        mask = readout.masks[hemi]
        own = out[:, at : at + len(mask)]
        at += len(mask)
        weight = vertex_weight(model.readouts[hemi]).double()
        bias = state[f"readouts.{hemi}.bias"]
        columns = [
            sum(own[:, q] @ weight[v] + bias[v] for q in np.flatnonzero(mask[:, v]))
            for v in range(mask.shape[1])
        ]
        found[hemi] = torch.stack(columns, 1)
    return found


@pytest.mark.parametrize("dim", [10, 16])
def test_the_transformer_is_its_equations(dim: int) -> None:
    shape = TokenShape(prefix=2, height=3, width=4, dim=dim)
    torch.manual_seed(1)
    readout = toy_readout()
    model = build_encoder(SMALL, shape, readout).eval()
    model.scaler.set(torch.randn(dim), torch.rand(dim) + 0.5)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    tokens = torch.randn(5, shape.n_tokens, dim)
    want, got = by_hand(model, tokens, readout), model(tokens)
    for hemi in ("lh", "rh"):
        torch.testing.assert_close(got[hemi].double(), want[hemi], rtol=1e-4, atol=1e-4)


def test_prefix_tokens_do_not_matter_and_places_do() -> None:
    torch.manual_seed(0)
    model = build_encoder(SMALL, SHAPE, toy_readout()).eval()
    tokens = torch.randn(2, SHAPE.n_tokens, 10)
    other = tokens.clone()
    other[:, :2] = 99
    torch.testing.assert_close(model(tokens)["lh"], model(other)["lh"])
    swapped = tokens.clone()
    swapped[:, [2, 5]] = tokens[:, [5, 2]]
    assert (model(tokens)["lh"] - model(swapped)["lh"]).abs().max() > 1e-5


def test_rows_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    model = build_encoder(SMALL, SHAPE, toy_readout()).eval()
    tokens = torch.randn(4, SHAPE.n_tokens, 10)
    torch.testing.assert_close(model(tokens)["rh"][1:2], model(tokens[1:2])["rh"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tokens_of_any_stored_dtype(dtype: torch.dtype) -> None:
    model = build_encoder(SMALL, SHAPE, toy_readout())
    assert model(torch.randn(2, SHAPE.n_tokens, 10).to(dtype))["lh"].dtype == torch.float32


@pytest.mark.parametrize("name", ["transformer", "linear"])
def test_every_parameter_learns(name: str) -> None:
    torch.manual_seed(0)
    cfg = ModelConfig(model=name, d_model=16, heads=4, ffn=24)  # type: ignore[arg-type]
    model = build_encoder(cfg, SHAPE, toy_readout())
    out = model(torch.randn(3, SHAPE.n_tokens, 10))
    sum(part.square().sum() for part in out.values()).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # The first block's queries start from zero, which that norm's weight cannot scale.
    assert idle == (["blocks.0.norm_attention.weight"] if name == "transformer" else [])


def test_the_state_loads_into_a_new_model_with_its_statistics() -> None:
    torch.manual_seed(0)
    first = build_encoder(SMALL, SHAPE, toy_readout()).eval()
    first.scaler.set(torch.full((10,), 3.0), torch.full((10,), 2.0))
    second = build_encoder(SMALL, SHAPE, toy_readout()).eval()
    second.load_state_dict(first.state_dict())
    tokens = torch.randn(2, SHAPE.n_tokens, 10)
    torch.testing.assert_close(first(tokens)["lh"], second(tokens)["lh"], rtol=0, atol=0)


def test_a_channel_that_hardly_varies_is_not_blown_up() -> None:
    scaler = TokenScaler(3)
    scaler.set(torch.zeros(3), torch.tensor([1.0, 0.0, 1e-9]))
    assert scaler(torch.ones(1, 3)).abs().max() <= 1001
    scaler.set(torch.zeros(3), torch.zeros(3))
    assert torch.isfinite(scaler(torch.zeros(1, 3))).all()


# ---- the linear encoder


@pytest.mark.parametrize("pool", ["mean", "cls", "grid"])
def test_linear_pools(pool: str) -> None:
    shape = TokenShape(prefix=1, height=4, width=6, dim=3)
    cfg = ModelConfig(model="linear", linear_pool=pool, linear_grid=2, dropout=0.0)  # type: ignore[arg-type]
    model = build_encoder(cfg, shape, toy_readout())
    tokens = torch.randn(2, shape.n_tokens, 3)
    maps = tokens[:, 1:].reshape(2, 4, 6, 3)
    if pool == "cls":
        pooled = tokens[:, 0]
    elif pool == "mean":
        pooled = maps.mean((1, 2))
    else:
        cells = [
            maps[:, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].mean((1, 2))
            for i in range(2)
            for j in range(2)
        ]
        pooled = torch.stack(cells, 2).flatten(1)
    layer = model.readouts["lh"]
    torch.testing.assert_close(model(tokens)["lh"], pooled @ layer.weight.T + layer.bias)


def test_cls_is_refused_without_one() -> None:
    shape = TokenShape(prefix=0, height=2, width=2, dim=3)
    with pytest.raises(InputError, match="no CLS token"):
        build_encoder(ModelConfig(model="linear", linear_pool="cls"), shape, toy_readout())


# ---- options and shapes


@pytest.mark.parametrize(
    "options",
    [
        {"heads": 5},
        {"d_model": 18, "heads": 2},
        {"layers": 0},
        {"dropout": 1.0},
        {"ffn": -1},
        {"linear_grid": 0},
    ],
)
def test_bad_sizes_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        ModelConfig(**options)  # type: ignore[arg-type]


def test_token_shapes_from_layouts() -> None:
    layout = {"n_prefix": 1, "grid": [31, 31]}
    assert TokenShape.of((962, 768), layout) == TokenShape(prefix=1, height=31, width=31, dim=768)
    assert TokenShape.of((7, 4), {}) == TokenShape(prefix=0, height=1, width=7, dim=4)
    with pytest.raises(InputError, match="962"):
        TokenShape.of((257, 768), layout)
    with pytest.raises(InputError, match="n_tokens, dim"):
        TokenShape.of((768,), layout)
    with pytest.raises(InputError, match="no patch"):
        TokenShape.of((1, 768), {"n_prefix": 1})
