"""Ctrl-C before a training trains: whatever it waits for, it ends at once and gives back what it held."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import train_helpers
from ray.util import placement_group_table
from real_kills import killing, workers
from rival import rival
from train_helpers import ToyTask, config, write_toy

from raypipe.cluster import turn as turn_file
from raypipe.cluster.node_memory import node_actor
from raypipe.cluster.runner import RayRunner
from raypipe.errors import Interrupted
from raypipe.memory.config import MemoryFlags, resolve
from raypipe.store import FeatureStore, adopt, declare, plan_adoption, stand_in
from raypipe.stream import ArraySource
from raypipe.train.follow import LOG_FILE

for module in (sys.modules[__name__], train_helpers):
    ray.cloudpickle.register_pickle_by_value(module)  # workers cannot import tests

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_session", "heeded_sigint"),
]
# Said in the issue: a second or two. Beside other work on two cores it may take longer.
SOON_S = 6.0


@dataclass(frozen=True)
class PlacedTask(ToyTask):
    """Its x lies on this node's disk alone, by a catalog: a row server reads it for nodes that may come."""

    x: Path = Path()

    def sources(self) -> Mapping[str, ArraySource]:
        return {**super().sources(), "x": ArraySource.of_locator(stand_in(self.x))}


@dataclass(frozen=True)
class Wait:
    """One thing to wait for. held : what keeps it from us; waits : whether it is waited for now."""

    held: Callable[[Path], Any]
    waits: Callable[[Path], bool]
    placed: bool = False


def state() -> dict[str, Any]:
    node = ray.get_runtime_context().get_node_id()
    return dict(ray.get(node_actor(node).state.remote(), timeout=60))


@contextmanager
def another_turn(tmp_path: Path) -> Iterator[None]:
    with turn_file.turn("another run", print):
        yield


@contextmanager
def all_cpus(tmp_path: Path) -> Iterator[None]:
    holder = ray.remote(Holder).options(num_cpus=ray.cluster_resources()["CPU"]).remote()
    ray.get(holder.ready.remote(), timeout=60)
    yield
    ray.kill(holder)


class Holder:
    def ready(self) -> None:
        """It has its CPUs."""


def waits_in_queue(run_dir: Path) -> bool:
    return bool(state()["queue"])


def waits_for_turn(run_dir: Path) -> bool:
    log = run_dir / LOG_FILE
    return log.exists() and "waits for its turn" in log.read_text()


def waits_for_place(run_dir: Path) -> bool:
    return any(group["state"] == "PENDING" for group in placement_group_table().values())


def asks_for_nodes() -> set[str]:
    """Trainings that ask an autoscaler for nodes, by Ray's own list."""
    try:
        asked = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
    except ValueError:
        return set()
    found = ray.get(asked.__ray_call__.remote(lambda self: set(self._ongoing_reqs)), timeout=60)
    return {one for one in found if one.startswith("train-")}


WAITS = {
    "turn": Wait(another_turn, waits_for_turn, placed=True),
    "row server": Wait(lambda path: rival(path / "theirs"), waits_in_queue, placed=True),
    "lease": Wait(lambda path: rival(path / "theirs"), waits_in_queue),
    "place": Wait(all_cpus, waits_for_place),
}


def task_of(tmp_path: Path, placed: bool) -> ToyTask:
    toy = write_toy(tmp_path / "data")
    if not placed:
        return toy
    adopt(plan_adoption(toy.data / "x.npy"))
    at = declare(FeatureStore.open(toy.data / "x.npy"), at=tmp_path / "catalogs" / "x.npy")
    return PlacedTask(toy.data, x=at)


@pytest.mark.parametrize("what", WAITS)
def test_the_first_ctrl_c_ends_it_and_nothing_is_held(
    tmp_path: Path, what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    wait, run_dir, sent = WAITS[what], tmp_path / "run", list[float]()
    task = task_of(tmp_path, wait.placed)
    memory = resolve(MemoryFlags(max_memory_per_process="1GiB"), environ={})
    runner = RayRunner(joined=wait.placed, on_event=print, memory=memory)

    def myself(_: object) -> int:
        sent.append(time.monotonic())
        return os.getpid()

    with ExitStack() as stack:
        stack.enter_context(wait.held(tmp_path))
        before, asked_before = state()["leases"], asks_for_nodes()
        with (
            pytest.raises(Interrupted, match="while it waited to train") as stop,
            killing(lambda: run_dir.exists() and wait.waits(run_dir), myself, by=signal.SIGINT),
        ):
            runner.fit(task, config(), run_dir, device="cpu")
        took_s = time.monotonic() - sent[0]
        assert took_s < SOON_S
        with capfd.disabled():
            print(f"{what}: {took_s:.1f} s")
        assert stop.value.exit_code == 130 and "\n" not in str(stop.value)
        until(lambda: not state()["queue"])
        assert state()["leases"] == before
        until(lambda: not workers("RowServer") and not workers("RayTrainWorker"))
        until(lambda: not workers("TrainController"))
        until(lambda: not waits_for_place(run_dir))
        assert asks_for_nodes() <= asked_before
        assert sorted(path.name for path in run_dir.glob(".*")) == []
    # Nobody has a place any more, nor will one be taken later.
    until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])
    assert "will be retried" not in capfd.readouterr().err  # Ray's own words
    if what == "lease":  # and the same command begins
        assert runner.fit(task, config(epochs=1), run_dir, device="cpu").epochs == 1


def until(true: Callable[[], object], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, (
            f"not so after {seconds:.0f} s: {placement_group_table()}"
        )
        time.sleep(0.05)
