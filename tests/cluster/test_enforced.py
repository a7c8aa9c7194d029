"""Budgets in the two things a runner does, on real Ray: killed, halved, done; or exit 3, bounded."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
import train_helpers
from torch import Tensor, nn
from train_helpers import ToyTask, config, write_toy

from raypipe.cluster import runner as runner_module
from raypipe.cluster.node_memory import actor_name, node_actor
from raypipe.cluster.runner import RayRunner
from raypipe.errors import MemoryBudgetExceeded
from raypipe.memory.config import MemoryFlags, resolve
from raypipe.memory.history import read_history
from raypipe.memory.limits import node_limits
from raypipe.memory.verdict import read_all
from raypipe.runner import Done, LocalRunner, Needs

for module in (sys.modules[__name__], train_helpers):
    ray.cloudpickle.register_pickle_by_value(module)  # workers cannot import tests

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

MIB = 1024**2


def runner(budget: str, said: list[str]) -> RayRunner:
    memory = resolve(MemoryFlags(max_memory_per_process=budget), environ={})
    return RayRunner(joined=False, on_event=said.append, memory=memory)


@dataclass(frozen=True)
class Load:
    """Takes ``batch`` times 100 MiB at once."""

    key: int
    batch: int

    def again(self) -> Load:
        return self

    def with_less_memory(self) -> Load:
        if self.batch == 1:
            raise MemoryBudgetExceeded("one at a time is too much")
        return replace(self, batch=self.batch // 2)

    def at_most(self, other: Load) -> Load:
        return replace(self, batch=min(self.batch, other.batch))


@dataclass(frozen=True)
class Hungry:
    """Makes a worker that holds what an item asks for; each_mib : of one of its batch."""

    each_mib: int

    def __call__(self) -> Eater:
        return Eater(self.each_mib)


class Eater:
    def __init__(self, each_mib: int) -> None:
        self.each_mib = each_mib

    def describe(self) -> str:
        return "eater"

    def open(self, shared: object) -> None: ...

    def step(self, item: Load, upcoming: Load | None) -> list[Done]:
        held = np.ones(item.batch * self.each_mib * MIB, np.uint8)
        time.sleep(0.2)
        return [Done(item.key, (item.batch, int(held[-1])))]

    def drain(self) -> list[Done]:
        return []

    def close(self) -> None: ...


def test_a_worker_over_its_budget_is_ended_and_its_work_is_done_in_halves(tmp_path: Path) -> None:
    said: list[str] = []
    with runner("2GiB", said).pool(Hungry(120), Needs(workers=1, run_dir=tmp_path)) as pool:
        done = list(pool.run([Load(key, 16) for key in range(3)], None))
    assert sorted(one.key for one in done) == [0, 1, 2]
    batches = {one.key: one.payload[0] for one in done}
    verdicts = read_all(tmp_path / "memory")
    # 1.9 GB of 2 is too much, 0.9 GB is not; learnt once, it holds for all items after.
    assert len(verdicts) == 1
    assert set(batches.values()) == {8}
    assert verdicts[0].budget_bytes == 2048 * MIB
    assert verdicts[0].usage_bytes <= 2048 * MIB
    assert any("was stopped" in text and "2.00 GiB" in text for text in said)
    logs = [read_history(path) for path in (tmp_path / "memory").glob("worker-*.csv")]
    assert len(logs) == 1 + len(verdicts)


def test_work_that_does_not_fit_in_ones_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    said: list[str] = []
    with (
        runner("1GiB", said).pool(Hungry(1500), Needs(workers=1, run_dir=tmp_path)) as pool,
        pytest.raises(MemoryBudgetExceeded) as stop,
    ):
        list(pool.run([Load(0, 4)], None))
    assert stop.value.exit_code == 3
    text = str(stop.value)
    for words in ("1.00 GiB", "was stopped", "--max-memory-per-process", "one at a time"):
        assert words in text
    assert "\n" not in text
    assert len(read_all(tmp_path / "memory")) == 3  # 4, 2, 1


def test_workers_whose_stated_budgets_do_not_fit_are_refused_before_they_start() -> None:
    most = int(node_limits().limit_bytes * 0.6 / MIB)
    with pytest.raises(MemoryBudgetExceeded, match="fewer --workers"):
        runner(f"{most}MiB", []).pool(Hungry(1), Needs(workers=2, cpus=0.5))
    runner(f"{most}MiB", []).pool(Hungry(1), Needs(workers=1, cpus=0.5))
    with pytest.raises(MemoryBudgetExceeded, match="fewer --workers"):
        runner(f"{most}MiB", []).pool(Hungry(1), Needs(workers=1, cpus=0.5, stands_for=2))


@pytest.fixture
def late_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a node that came when workers were already asked for: nobody has made its actor."""
    monkeypatch.setattr(runner_module, "make_everywhere", dict)
    node_id = ray.get_runtime_context().get_node_id()
    actor = node_actor(node_id)
    ray.get(actor.state.remote(), timeout=60)
    ray.kill(actor)
    deadline = time.monotonic() + 20
    while actor_name(node_id) in {one["name"] for one in _named()}:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _named() -> list[dict[str, str]]:
    return [one for one in ray.util.list_named_actors(all_namespaces=True) if isinstance(one, dict)]


@pytest.mark.usefixtures("late_node")
def test_workers_that_are_older_than_their_nodes_actor_give_way_to_newer_ones(
    tmp_path: Path,
) -> None:
    """Ray's own monitor ends the newest first: that has to be the hog."""
    with runner("2GiB", []).pool(Hungry(1), Needs(workers=1, run_dir=tmp_path)) as pool:
        done = list(pool.run([Load(0, 1)], None))
    assert len(done) == 1
    logs = [path.stem for path in (tmp_path / "memory").glob("worker-*.csv")]
    first, second = sorted(name.rpartition("-")[0] for name in logs)
    assert first.endswith("-1") and second == f"{first[:-1]}2"


@dataclass(frozen=True)
class HungryTask(ToyTask):
    """Each row of a micro batch takes ``row_mib`` for the length of its step."""

    row_mib: int = 0

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        held = torch.ones(len(batch["x"]) * self.row_mib * MIB, dtype=torch.uint8)
        time.sleep(0.05)
        return super().loss(model, batch) + 0.0 * float(held[-1])


def step_losses(run_dir: Path) -> list[float]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "step"]


@pytest.mark.usefixtures("late_node")
def test_training_over_its_budget_goes_on_with_half_the_batch_and_the_same_losses(
    tmp_path: Path,
) -> None:
    """Its first workers are older than their node's actor as well, and begin anew before that."""
    toy = write_toy(tmp_path / "data")
    cfg, said = config(batch_size=8, epochs=2), []
    hungry = HungryTask(toy.data, row_mib=200)  # 1.6 GiB in eights, 800 MiB in fours
    result = runner("2GiB", said).fit(hungry, cfg, tmp_path / "run", device="cpu")
    assert result.epochs == 2
    verdicts = read_all(tmp_path / "run" / "memory")
    assert verdicts
    assert verdicts[0].batch == 8
    logs = list((tmp_path / "run" / "memory").glob("train-worker-*.csv"))
    assert len(logs) == 2 + len(verdicts), "the older one, each that was ended, and the last"
    assert list((tmp_path / "run" / "memory").glob("*.gave-way")), "the older one did not give way"
    LocalRunner().fit(toy, cfg, tmp_path / "plain", device="cpu")
    np.testing.assert_allclose(
        step_losses(tmp_path / "run"), step_losses(tmp_path / "plain"), rtol=1e-4
    )


def test_training_that_does_not_fit_row_by_row_exits_3(tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "data")
    hungry = HungryTask(toy.data, row_mib=2500)
    with pytest.raises(MemoryBudgetExceeded, match=r"was stopped.* at batch 1") as stop:
        runner("2GiB", []).fit(hungry, config(batch_size=2), tmp_path / "run", device="cpu")
    assert stop.value.exit_code == 3
    assert len(read_all(tmp_path / "run" / "memory")) == 2


def test_a_training_that_ends_before_its_first_rows_is_not_tried_again(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Large(ToyTask):
        def build_model(self) -> nn.Module:
            self_held = torch.ones(3 << 30, dtype=torch.uint8)
            return super().build_model() if self_held[-1] else nn.Identity()

    toy = write_toy(tmp_path / "data")
    with pytest.raises(MemoryBudgetExceeded, match="was stopped") as stop:
        runner("2GiB", []).fit(Large(toy.data), config(), tmp_path / "run", device="cpu")
    assert stop.value.exit_code == 3
    assert len(read_all(tmp_path / "run" / "memory")) == 1
