"""Predicted memory against counts by hand, against a worker's own log, and what is refused by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tile_models import UNet, seeded
from torch import Tensor, nn

from raypipe.errors import MemoryBudgetExceeded
from raypipe.memory.config import resolve
from raypipe.runner import LocalRunner, Machines, Prospect
from raypipe.tile import forecast as forecast_module
from raypipe.tile.config import TileConfig
from raypipe.tile.forecast import budget_of, forecast, is_known, live_bytes, require_memory
from raypipe.tile.plan import TilePlan, make_plan
from raypipe.tile.source import ArraySource

PLANE = 4 * 64 * 64  # one channel of 64 x 64 float32


def test_a_chain_holds_two_neighbours() -> None:
    chain = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 3, 3, padding=1)
    ).eval()
    assert live_bytes(chain, (1, 1, 64, 64)) == ((8 + 3) * PLANE, 3)
    assert live_bytes(chain, (2, 1, 64, 64)) == (2 * (8 + 3) * PLANE, 3)


def test_a_skip_is_held_to_where_it_is_joined() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 4, 1), nn.Conv2d(8, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            wide = self.first(x)  # 4 planes
            joined = torch.cat([wide, wide.relu()], 1)  # with the ReLU's 4 and its own 8: 16
            return self.last(joined)  # the ReLU's are gone: 4 + 8 + 1

    assert live_bytes(Skip().eval(), (1, 1, 64, 64)) == (16 * PLANE, 1)


def test_what_comes_after_counts_too() -> None:
    one = nn.Conv2d(1, 1, 1).eval()
    most, channels = live_bytes(one, (1, 1, 64, 64), lambda out: out.double())
    assert (most, channels) == (3 * PLANE, 1)


def test_the_models_own_weights_are_left_alone() -> None:
    model = seeded(UNet)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    live_bytes(model, (1, 1, 64, 64))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def plan_of(model: nn.Module, out: Path, **options: object) -> TilePlan:
    image = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (4000, 3000), (0, 0))
    options = {"chunk_size": 512, "halo": 22, "align": 4, **options}
    return make_plan(ArraySource(image, "YX"), model, out, TileConfig(**options))  # type: ignore[arg-type]


def test_windows_and_results_by_hand(tmp_path: Path) -> None:
    plan = plan_of(seeded(UNet), tmp_path / "out.npy", batch=2)
    found = forecast(plan, "cpu")
    window = (512 + 2 * 24) ** 2  # the halo is rounded up to align
    assert found.windows == 2 * 2 * 4 * window + 2 * (4 * window + window)
    assert found.results == 2 * 2 * 4 * window + 4 * 512**2
    assert found.weights == 4 * sum(p.numel() for p in plan.model.parameters()) + sum(
        b.nbytes for b in plan.model.buffers()
    )
    on_gpu = replace(found, on_gpu=True)
    assert found.host_bytes == on_gpu.host_bytes + found.network
    assert "on the GPU" in on_gpu.words(1 << 32)


def test_blending_holds_a_block(tmp_path: Path) -> None:
    plan = plan_of(seeded(UNet), tmp_path / "out.npy", blend="linear", overlap=32)
    window, block = (512 + 2 * 32) ** 2, (4 * 512) * (4 * 512)
    assert forecast(plan, "cpu").results == block * (4 + 2 * 4) + 3 * window * 4


def test_a_model_may_look_at_its_values(tmp_path: Path) -> None:
    class Asks(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1.0 if bool(x.sum() > -1e9) else 2.0)

    # The convolution's plane, and it times 1.
    assert live_bytes(Asks(1, 1, 1), (1, 1, 640, 640)) == (2 * 100 * PLANE, 1)


def test_what_does_not_grow_is_counted_once(tmp_path: Path) -> None:
    class Table(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            table = torch.zeros(1000, dtype=x.dtype)  # 4000 bytes, whatever the image
            return x + table[0]

    most, _ = live_bytes(Table(), (3, 1, 64, 64))
    assert most == 4000 + 3 * PLANE


def test_a_window_that_fits_no_worker_is_refused_with_one_that_does(tmp_path: Path) -> None:
    plan = plan_of(seeded(UNet), tmp_path / "out.npy", chunk_size=4000)
    need = forecast(plan, "cpu").host_bytes
    small = forecast(plan.resized(1000), "cpu").host_bytes
    assert small < need
    budget = (need + small) // 2 + (256 << 20)  # a process is stopped 256 MiB below it
    with pytest.raises(MemoryBudgetExceeded, match=r"take --chunk-size (1000|2000), or a larger"):
        require_memory(plan, "cpu", budget)
    require_memory(plan.resized(1000), "cpu", budget)


def test_workers_on_one_machine_share_it() -> None:
    memory = resolve()
    budget, capacity = memory.config.budget_bytes, memory.config.capacity_bytes(memory.limits)
    assert budget_of(LocalRunner(memory), 1) == budget
    prospect = Prospect(memory=memory, machines=Machines(nodes=(("", 64),)))
    assert budget_of(prospect, 64) == min(budget, capacity // 64)
    assert budget_of(prospect, 1) == min(budget, capacity)


def test_a_worker_apart_does_not_hold_what_a_notebook_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(seeded(UNet), tmp_path / "out.npy")
    monkeypatch.setattr(forecast_module, "charge_bytes", lambda: 12 << 30)
    here, apart = forecast(plan, "cpu"), forecast(plan, "cpu", apart=True)
    assert here.base == 12 << 30 and apart.base < 1 << 30
    assert here.host_bytes - apart.host_bytes == here.base - apart.base
    require_memory(plan, "cpu", 2 << 30, apart=True)
    with pytest.raises(MemoryBudgetExceeded):
        require_memory(plan, "cpu", 2 << 30)


def test_nodes_of_a_joined_cluster_have_budgets_of_their_own() -> None:
    memory = resolve()
    assert is_known(LocalRunner(memory))
    for grows in (False, True):
        machines = Machines(nodes=(("head", 2), ("node", 64)), grows=grows)
        assert is_known(Prospect(memory=memory, machines=machines)) is not grows


@pytest.mark.parametrize("name", ["out.npy", "out.tif"])
@pytest.mark.parametrize(
    ("overlap", "align", "chunk"),
    # The last three overlaps are rounded up to align: more than half of a tile of twice the overlap.
    [(200, 4, 500), (64, 4, 1024), (32, 24, 560), (33, 32, 544), (33, (32, 4), 544)],
)
def test_with_blending_the_refusal_is_of_memory(
    tmp_path: Path, name: str, overlap: int, align: Any, chunk: int
) -> None:
    options = {"blend": "linear", "overlap": overlap, "align": align, "chunk_size": chunk}
    plan = plan_of(seeded(UNet), tmp_path / name, **options)
    with pytest.raises(MemoryBudgetExceeded, match="it takes a larger --max-memory"):
        require_memory(plan, "cpu", 512 << 20)
