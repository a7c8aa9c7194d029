"""Memory that ends a run, on one worker and on two: exit code 3, and what was learnt is saved.

Two real processes joined by gloo; each pair of runs is made once, the tests look at what it left.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from train_helpers import (
    Clock,
    FakeGuard,
    LateTask,
    ToyTask,
    config,
    losses,
    run,
    same_run,
    saved_steps,
    spawn,
    write_toy,
)

from raypipe.errors import MemoryBudgetExceeded, RaypipeError
from raypipe.memory.guard import guarding
from raypipe.train import checkpoint, precision
from raypipe.train.engine import Engine
from raypipe.train.saving import FIRST_S, LOCK


class FullGuard(FakeGuard):
    """A process over its hard limit from the n-th boundary on."""

    def pressure(self) -> bool:
        self.asked += 1
        if self.asked > self.at[0]:
            raise MemoryBudgetExceeded("this worker holds too much")
        return False


@pytest.mark.parametrize("room_for", [0, 9, 11])
def test_one_worker_saves_the_last_whole_step(tmp_path: Path, room_for: int) -> None:
    toy = write_toy(tmp_path / "toy")
    late = LateTask(toy.data, room_for=room_for)
    with pytest.raises(MemoryBudgetExceeded, match="one row at once") as ended:
        run(late, config(), tmp_path / "run")
    assert ended.value.exit_code == 3
    assert saved_steps(tmp_path / "run") == (room_for or None)  # nothing learnt, nothing to keep
    run(toy, config(), tmp_path / "run")
    run(toy, config(), tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_the_first_checkpoint_comes_after_a_minute(tmp_path: Path) -> None:
    """20 s a step, known a step late: at 60 s it is due, after the fourth step it is there."""
    toy = write_toy(tmp_path / "toy")
    at: dict[int, int | None] = {}
    clock = Clock(rate=20.0)

    def seen() -> bool:
        at[len(at)] = saved_steps(tmp_path / "run")
        return clock.tick()

    cfg = config(epochs=1, batch_size=2, checkpoint_every_s=10_000)
    run(toy, cfg, tmp_path / "run", clock=clock, should_stop=seen)
    assert FIRST_S == 60
    assert [at[step] for step in (2, 3, 4, 5, 21)] == [None, None, 4, 4, 4]


@dataclass(frozen=True)
class Runs:
    """What both processes do; picklable."""

    root: Path
    toy: ToyTask

    def __call__(self, rank: int, world: int) -> None:
        def go(name: str, task: ToyTask = self.toy, **options: Any) -> Any:
            cfg = config(batch_size=4, **options)
            return run(task, cfg, self.root / name, rank=rank, world=world)

        guard = FullGuard(8 if rank == 1 else 10**9)
        with guarding(guard):
            self.note(rank, "full", failure(lambda: go("full")))
        go("full")
        late = LateTask(self.toy.data, room_for=8 + 1)  # one loss is the trial's, before DDP
        self.note(rank, "late", failure(lambda: go("late", late)))
        go("late")
        self.note(rank, "in step", self.in_step(rank))
        noisy = replace(self.toy, dropout=0.4)
        go("noisy", noisy)
        late = LateTask(noisy.data, dropout=0.4, room_for=1, where="validation", rank=1)
        self.note(rank, "validation", failure(lambda: go("validation", late)))
        go("validation", noisy)
        # The last: rank 1 leaves, and rank 0 waits for its gradients until it has.
        late = LateTask(self.toy.data, room_for=8 + 1, rank=1)
        self.note(rank, "alone", failure(lambda: go("alone", late)))

    def in_step(self, rank: int) -> list[int]:
        """Rows of each backward pass when batch norm counts as synchronised (which CPUs cannot)."""
        real, seen = Engine.backward, []

        def backward(self: Engine, micro: Any, batch: Any) -> Tensor:
            seen.append(len(micro.rows))
            return real(self, micro, batch)

        synced, precision._apply_sync_batch_norm = precision._apply_sync_batch_norm, lambda *a: 1
        Engine.backward = backward  # type: ignore[method-assign]
        try:
            with guarding(FakeGuard(*([2, 3] if rank == 1 else []))):
                cfg = config(batch_size=4, accumulate=2, epochs=2, sync_batch_norm=True)
                run(self.toy, cfg, self.root / "in-step", rank=rank, world=2)
        finally:
            Engine.backward = real  # type: ignore[method-assign]
            precision._apply_sync_batch_norm = synced
        return seen

    def note(self, rank: int, name: str, value: Any) -> None:
        steps = saved_steps(self.root / name) if rank == 0 else None
        (self.root / f"note-{name}-{rank}.json").write_text(json.dumps([value, steps]))

    def noted(self, name: str) -> list[Any]:
        return [json.loads((self.root / f"note-{name}-{r}.json").read_text()) for r in (0, 1)]


def failure(act: Callable[[], Any]) -> str:
    try:
        act()
    except RaypipeError as error:
        return f"{error.exit_code} {error}"
    except RuntimeError as error:  # the other rank has gone
        return f"gone: {error}"
    return "none"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("exhausted")
    runs = Runs(root, write_toy(root / "data"))
    spawn(runs, root)
    run(runs.toy, config(), root / "one")
    return runs


def test_a_full_worker_stops_both_with_a_checkpoint(runs: Runs) -> None:
    """Full before step 8; the others know at the end of step 9, and all save there."""
    (first, steps), (second, _) = runs.noted("full")
    assert first.startswith("3 another worker ran out of its memory budget; all stopped after 10")
    assert second == "3 this worker holds too much"
    assert steps == 10


def test_a_device_without_memory_leaves_rank_0s_checkpoint(runs: Runs) -> None:
    (first, steps), (second, _) = runs.noted("late")
    assert first == second and first.startswith("3 the device ran out of memory")
    assert steps == 8


@pytest.mark.parametrize("name", ["full", "late"])
def test_both_go_on_to_the_same_end(runs: Runs, name: str) -> None:
    assert losses(runs.root / name) == pytest.approx(losses(runs.root / "one"), rel=1e-5)


def test_a_full_validation_is_saved_by_both_with_their_generators(runs: Runs) -> None:
    (first, steps), (second, _) = runs.noted("validation")
    assert first == second and first.startswith("3 the device ran out of memory")
    assert steps == 2 * 6
    same_run(runs.root / "validation", runs.root / "noisy")


def test_a_rank_that_is_full_alone_saves_for_all(runs: Runs) -> None:
    """Rank 0, which writes the log, waits for gradients: the log's last line is missing in it."""
    (first, _), (second, _) = runs.noted("alone")
    assert second.startswith("3 the device ran out of memory") and first.startswith("gone: ")
    run_dir = runs.root / "alone"
    found = checkpoint.newest(run_dir)
    assert found is not None and found.meta["progress"]["global_step"] == 8
    assert [r["global_step"] for r in found.meta["metrics_tail"]] == [7]
    generators = found.load("state")["rng"]
    assert generators[0] is None and generators[1] is not None
    assert not (run_dir / LOCK).exists()
    run(runs.toy, config(), run_dir)
    assert losses(run_dir) == pytest.approx(losses(runs.root / "one"), rel=1e-5)


def test_under_syncbn_all_ranks_make_as_many_passes(runs: Runs) -> None:
    """43 rows in steps of 16: 8 a rank in 2 micro batches, and 11 (6 and 5) in 2; from step 2 on rank
    1 may take 2 rows at once only, so rank 0 does as well.
    """
    (first, _), (second, _) = runs.noted("in step")
    assert len(first) == len(second)
    assert first[:4] == second[:4] == [4] * 4
    assert first[4:8] == [2, 1, 2, 1] and second[4:8] == [2, 1, 1, 1]
    assert max(first[4:]) == max(second[4:]) == 2
    assert sum(first) + sum(second) == 2 * 43
