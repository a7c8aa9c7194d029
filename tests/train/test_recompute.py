"""Checkpointed blocks against plain ones: losses, gradients and, bit by bit, buffers."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from train_helpers import SmallDeviceModel, SmallDeviceTask, ToyTask, config, records, run

from raypipe.errors import ConfigError
from raypipe.segment.model import UNetConfig, build_model, checkpoint_blocks
from raypipe.train import TrainConfig, WorkerContext, load_model_state
from raypipe.train.precision import prepare
from raypipe.train.recompute import recompute

AMP = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


# Sums in another order differ.
pytestmark = pytest.mark.usefixtures("one_thread")


def unet(dropout: float = 0.3) -> nn.Module:
    return build_model(UNetConfig(in_channels=2, width=4, depth=3, dropout=dropout), 1)


def train(
    model: nn.Module, amp: torch.dtype | None = None, scale: float = 1.0, n_steps: int = 3
) -> tuple[list[float], list[Tensor]]:
    """Losses and last gradients of a few steps of SGD on random images."""
    torch.manual_seed(11)
    batches = torch.randn(n_steps, 2, 2, 16, 16) * scale
    model.train()
    losses = []
    for x in batches:
        model.zero_grad()
        with torch.autocast("cpu", dtype=amp or torch.bfloat16, enabled=amp is not None):
            loss = model(x).float().square().mean()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for p in model.parameters():
                p -= 1e-3 * (p.grad if p.grad is not None else 0)
    return losses, [p.grad for p in model.parameters() if p.grad is not None]


def bits(model: nn.Module) -> dict[str, bytes]:
    """Every buffer's bytes, so that NaN equals NaN and 0 is not -0."""
    return {name: b.numpy().tobytes() for name, b in model.named_buffers()}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("amp", AMP)
def test_a_recomputed_unet_equals_the_plain_one(reentrant: bool, amp: str) -> None:
    plain, other = unet(), unet()
    recompute(checkpoint_blocks(other), reentrant)
    losses, grads = train(plain, AMP[amp])
    other_losses, other_grads = train(other, AMP[amp])
    assert other_losses == losses
    for ours, theirs in zip(other_grads, grads, strict=True):
        assert torch.equal(ours, theirs)
    assert bits(other) == bits(plain)
    assert int(other.get_buffer("first.1.num_batches_tracked")) == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_without_this_batch_norm_counts_twice(reentrant: bool) -> None:
    """What torch's own checkpointing does, so that the test above is one that can fail."""
    model = unet()
    first = model.get_submodule("first")
    forward = first.forward
    first.forward = lambda x: checkpoint(forward, x, use_reentrant=reentrant)  # type: ignore[method-assign]
    torch.manual_seed(11)
    model(torch.randn(2, 2, 16, 16, requires_grad=True)).mean().backward()
    assert int(model.get_buffer("first.1.num_batches_tracked")) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_statistics_that_overflowed_are_equal_too(reentrant: bool) -> None:
    """Infinite activations, as under fp16 with too high a scale: momentum 0 would give NaN."""
    plain, other = unet(), unet()
    recompute(checkpoint_blocks(other), reentrant)
    train(plain, scale=3e38, n_steps=1)
    train(other, scale=3e38, n_steps=1)
    assert not all(torch.isfinite(b).all() for b in plain.buffers())
    assert bits(other) == bits(plain)


class Reads(nn.Module):
    """Uses, then moves, a buffer in its forward: what it computes depends on what was there."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.ones(4))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x * self.seen).tanh()
        self.seen += x.detach().abs().mean(0)
        return out


def spectral() -> nn.Module:
    return nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Tanh())


def averaging() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None), nn.Tanh())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [Reads, spectral, averaging])
def test_a_block_that_reads_its_buffers_reads_the_same_again(
    make: Callable[[], nn.Module], reentrant: bool
) -> None:
    torch.manual_seed(2)
    plain = make()
    other = deepcopy(plain)
    recompute([other], reentrant)
    for model in (plain, other):
        torch.manual_seed(3)
        for _ in range(3):
            # Twice before the backward: each call's second run sees what that call saw.
            (model(torch.randn(5, 4)) + model(torch.randn(5, 4))).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        # The reentrant variant adds up each call's gradient by itself: another order of sums.
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-6), name
    assert bits(other) == bits(plain)


def test_a_block_inside_a_block_counts_once() -> None:
    plain, other = unet(0.0), unet(0.0)
    inner = [other.get_submodule("first.0"), other.get_submodule("down.0.convs")]
    recompute([*inner, *checkpoint_blocks(other)], use_reentrant=False)
    losses, _ = train(plain)
    assert train(other)[0] == losses
    assert bits(other) == bits(plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_frozen_norm_reads_its_statistics_and_nothing_moves(reentrant: bool) -> None:
    plain, other = unet(0.0), unet(0.0)
    recompute(checkpoint_blocks(other), reentrant)
    for model in (plain, other):
        model.eval()
        x = torch.linspace(-1, 1, 512).view(1, 2, 16, 16)
        model(x).square().mean().backward()
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.equal(a.grad, b.grad)
    assert bits(other) == bits(unet())


def test_buffers_are_the_modules_own_again_also_after_an_error() -> None:
    block = Reads()
    recompute([block], use_reentrant=False)
    own = block.seen
    x = torch.randn(3, 4)
    loss = block(x).sum()
    block.linear.weight.data = torch.randn(5, 5)  # the second run cannot be computed
    with pytest.raises(RuntimeError):
        loss.backward()
    assert block.seen is own


def prepared_losses(**options: bool | str) -> tuple[list[float], dict[str, bytes]]:
    model = build_model(UNetConfig(in_channels=2, width=2, depth=2), 1)
    cfg = TrainConfig(**options)  # type: ignore[arg-type]
    ctx = WorkerContext(run_dir=Path())
    prepared = prepare(model, checkpoint_blocks(model), cfg, ctx)
    return train(prepared.model)[0], bits(prepared.module)


@pytest.mark.filterwarnings("ignore")  # torch.compile trips over its own
def test_compiled_blocks_are_recomputed_alike() -> None:
    """By graph capture alone: which code a backend then makes is not ours."""
    plain = prepared_losses()
    whole = prepared_losses(compile=True, compile_backend="eager")
    assert whole[0] == pytest.approx(plain[0], rel=1e-5)
    found = prepared_losses(compile=True, compile_backend="aot_eager", checkpointing=True)
    torch._dynamo.reset()
    assert found[0] == pytest.approx(plain[0], rel=1e-5)
    assert found[1].keys() == plain[1].keys()
    counts = {k: v for k, v in plain[1].items() if k.endswith("num_batches_tracked")}
    assert counts and counts.items() <= found[1].items()


def test_channels_last_gives_the_same_losses() -> None:
    plain, other = prepared_losses(), prepared_losses(channels_last=True, checkpointing=True)
    assert other[0] == pytest.approx(plain[0], rel=1e-5)


def test_synchronised_batch_norm_needs_cuda_and_several_workers() -> None:
    model = unet()
    cfg, path = TrainConfig(sync_batch_norm=True), Path()
    alone = prepare(model, (), cfg, WorkerContext(run_dir=path))
    assert alone.synced_norms == 0
    with pytest.raises(ConfigError, match="sync_batch_norm"):
        prepare(model, (), cfg, WorkerContext(run_dir=path, world=2))


class NormModel(SmallDeviceModel):
    """ToyModel on a device of few rows, with statistics that a failed forward has already moved."""

    def __init__(self, rows: int) -> None:
        super().__init__(0.0, rows)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


@dataclass(frozen=True)
class NormTask(SmallDeviceTask):
    def build_model(self) -> nn.Module:
        return NormModel(self.rows)


def test_a_step_that_starts_over_moves_the_statistics_once(toy: ToyTask, tmp_path: Path) -> None:
    """Out of memory after the forward: as if the rows had been few from the start."""
    cfg = config(epochs=1)
    halved = NormTask(toy.data, rows=4)
    run(halved, cfg, tmp_path / "halved")
    assert records(tmp_path / "halved")[0]["micro_batch"] == 4
    run(replace(halved, rows=10**9), cfg, tmp_path / "few", batch_limit=4)
    ends = [load_model_state(tmp_path / name) for name in ("halved", "few")]
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
