"""A parameter that the loss never reaches ends no training of several workers, and changes no number.

Two real processes joined by gloo against one process, which never asks for such a gradient.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_helpers import ToyModel, ToyTask, config, grad_norms, losses, run, spawn, write_toy

from raypipe.errors import ConfigError
from raypipe.segment.model import build_model, spec_of
from raypipe.train import WorkerContext, load_model_state
from raypipe.train.precision import prepare
from raypipe.train.trial import unreached


class Spare(ToyModel):
    """With a layer that no forward uses, a buffer that each forward moves, and dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__(dropout)
        self.spare = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return super().forward(x)


@dataclass(frozen=True)
class SpareTask(ToyTask):
    def build_model(self) -> nn.Module:
        return Spare(self.dropout)


SPARE = ("spare.bias", "spare.weight")


@dataclass(frozen=True)
class Runs:
    """What both processes do; picklable."""

    root: Path
    task: SpareTask

    def __call__(self, rank: int, world: int) -> None:
        said: list[str] = []

        def go(name: str, **options: Any) -> None:
            cfg = config(epochs=2, batch_size=2, accumulate=2, **options)
            run(self.task, cfg, self.root / name, rank=rank, world=world, say=said.append)

        go("two")
        go("recomputed", checkpointing=True)
        try:
            go("reentrant", checkpointing=True, use_reentrant=True)
        except ConfigError as error:
            said.append(str(error))
        (self.root / f"said-{rank}.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("unreached")
    runs = Runs(root, SpareTask(write_toy(root / "data").data))
    spawn(runs, root)
    run(runs.task, config(epochs=2), root / "one")
    return runs


@pytest.mark.parametrize("name", ["two", "recomputed"])
def test_two_workers_train_what_one_does(runs: Runs, name: str) -> None:
    ours, one = runs.root / name, runs.root / "one"
    assert losses(ours) == pytest.approx(losses(one), rel=1e-5)
    assert grad_norms(ours) == pytest.approx(grad_norms(one), rel=1e-4)
    a, b = (load_model_state(folder / "last") for folder in (ours, one))
    for key in SPARE:  # neither decayed nor moved
        assert torch.equal(a[key], b[key])
    assert a["calls"] == 2 * 11  # micro batches of two epochs: the trial's forward is undone


def test_it_is_said_which(runs: Runs) -> None:
    said = json.loads((runs.root / "said-0.json").read_text())
    assert "2 parameters (spare.bias, spare.weight) the loss did not reach" in said[0]


def test_the_reentrant_variant_is_refused_on_every_rank(runs: Runs) -> None:
    for rank in (0, 1):
        said = json.loads((runs.root / f"said-{rank}.json").read_text())
        assert "leave use_reentrant out" in said[-1]


def test_a_trial_leaves_nothing_behind(toy: ToyTask, tmp_path: Path) -> None:
    task, cfg = SpareTask(toy.data, dropout=0.5), config()
    ctx = WorkerContext(run_dir=tmp_path)
    prepared = prepare(task.build_model(), (), cfg, ctx)
    before = {name: value.clone() for name, value in prepared.module.state_dict().items()}
    state = torch.get_rng_state()
    assert unreached(task, cfg, ctx, prepared) == SPARE
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in prepared.module.parameters())
    for name, value in prepared.module.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(("limit", "rows"), [(None, 2), (3, 2), (1, 1)])
def test_a_trial_stays_within_what_memory_allows(
    toy: ToyTask, tmp_path: Path, limit: int | None, rows: int
) -> None:
    seen: list[int] = []

    class Seen(SpareTask):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            seen.append(len(batch["x"]))
            return super().loss(model, batch)

    task, ctx = Seen(toy.data), WorkerContext(run_dir=tmp_path)
    prepared = prepare(task.build_model(), (), config(), ctx)
    assert unreached(task, config(), ctx, prepared, limit) == SPARE
    assert seen == [rows]


@pytest.mark.skipif(
    importlib.util.find_spec("segmentation_models_pytorch") is None, reason="no raypipe[smp]"
)
def test_a_library_encoder_with_spare_parts_is_found_out(tmp_path: Path) -> None:
    """The reason for all this: smp's EfficientNet keeps the head of the classifier that it was."""

    class Library(ToyTask):
        def build_model(self) -> nn.Module:
            return build_model(spec_of("smp:Unet:efficientnet-b0", in_channels=1, classes=1))

        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            images = batch["x"].float().mean(1)[:, None, None, None].expand(-1, 1, 32, 32)
            found: Tensor = model(images).square().mean((1, 2, 3))
            return found

    task, cfg = Library(write_toy(tmp_path / "toy").data), config()
    ctx = WorkerContext(run_dir=tmp_path)
    names = unreached(task, cfg, ctx, prepare(task.build_model(), (), cfg, ctx))
    assert {name.split(".")[1] for name in names} == {"_conv_head", "_bn1"}
