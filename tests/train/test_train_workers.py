"""Two real processes joined by gloo, against one: the same losses, and nobody left waiting.

All runs of two are made in one pair of processes (starting one costs seconds); the tests look at
what they left on disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import (
    Clock,
    FakeGuard,
    KillAfter,
    Killed,
    SmallDeviceTask,
    StopAfter,
    ToyTask,
    config,
    grad_norms,
    losses,
    records,
    run,
    spawn,
    write_toy,
)

from raypipe.errors import NoSpace, RaypipeError
from raypipe.memory.guard import guarding
from raypipe.stream import StepSlice
from raypipe.train import WorkerContext, checkpoint, fit, load_model_state, precision, training_plan
from raypipe.train.engine import Engine


@dataclass(frozen=True)
class Runs:
    """What both processes do, one run after the other; picklable."""

    root: Path
    toy: ToyTask

    def __call__(self, rank: int, world: int) -> None:
        def go(name: str, task: ToyTask, cfg: Any, **context: Any) -> Any:
            return run(task, cfg, self.root / name, rank=rank, world=world, **context)

        noisy = replace(self.toy, dropout=0.4)
        go("two", self.toy, config(batch_size=4))
        go("idle", replace(self.toy, n_train=41), config(batch_size=4))
        go("few", replace(self.toy, n_train=1, n_val=1), config(batch_size=4))
        with counted_syncs() as syncs:
            go("accumulated", self.toy, config(batch_size=2, accumulate=2))
        self.note(rank, "syncs", len(syncs))
        recompute = {"batch_size": 2, "accumulate": 2, "checkpointing": True}
        for use_reentrant in (False, True):
            name = f"reentrant-{use_reentrant}"
            go(name, self.toy, config(use_reentrant=use_reentrant, **recompute))
        with guarding(FakeGuard(*range(3) if rank == 1 else ())):
            go("throttled", self.toy, config(batch_size=4))
        small = SmallDeviceTask(self.toy.data, rows=2)
        self.note(rank, "no memory", self.failure(lambda: go("small", small, config())))
        go("noisy", noisy, config(batch_size=4, checkpoint_every_steps=2))
        stop = StopAfter(8) if rank == 1 else StopAfter(10**9)
        result = go("noisy-broken", noisy, config(batch_size=4), should_stop=stop)
        self.note(rank, "stopped", result.stopped)
        go("noisy-broken", noisy, config(batch_size=4))
        self.timed(rank, noisy, go)
        go("to-one", self.toy, config(batch_size=4), should_stop=StopAfter(8))
        if rank == 0:
            run(self.toy, config(), self.root / "to-two", should_stop=StopAfter(8))
        torch.distributed.barrier()
        go("to-two", self.toy, config())
        self.note(rank, "lost row", self.failure(lambda: self.lose_a_row(rank, world)))
        self.note(rank, "full disk", self.failure(lambda: self.full_disk(rank, go)))
        with torch.random.fork_rng():
            ctx = WorkerContext(run_dir=self.root / "seeds", rank=rank, world=world)
            model = Engine(self.toy, config(), ctx).module
            self.note(rank, "weights", float(model.head.weight.sum()))
            self.note(rank, "dropout", torch.rand(1).item())
        elsewhere = replace(self.toy, data=self.root / "data" if rank == 0 else self.root / "no")
        self.note(rank, "no data", self.failure(lambda: go("no", elsewhere, config())))
        reports: list[dict[str, Any]] = []
        go("reported", self.toy, config(batch_size=4), report=reports.append)
        self.note(rank, "reports", [r["val_loss"] for r in reports])

    def timed(self, rank: int, noisy: ToyTask, go: Any) -> None:
        """Rank 0's clock alone decides; both die at the same step and go on from what it saved."""
        cfg = config(batch_size=4, checkpoint_every_s=2)
        clock = Clock(rate=1.0 if rank == 0 else 1000.0, then=KillAfter(11))
        with counted_calls(Engine, "training_state") as saves, suppress(Killed):
            go("noisy-timed", noisy, cfg, clock=clock, should_stop=clock.tick)
        self.note(rank, "timed saves", len(saves))
        go("noisy-timed", noisy, cfg)

    def note(self, rank: int, name: str, value: Any) -> None:
        (self.root / f"note-{name}-{rank}.json").write_text(json.dumps(value))

    def noted(self, name: str) -> list[Any]:
        return [json.loads((self.root / f"note-{name}-{r}.json").read_text()) for r in (0, 1)]

    def failure(self, act: Callable[[], Any]) -> str:
        try:
            act()
        except RaypipeError as error:
            return f"{type(error).__name__}: {error}"
        return "none"

    def lose_a_row(self, rank: int, world: int) -> None:
        cfg = config(batch_size=4)
        plan = training_plan(self.toy.train_rows, cfg, world)

        def slices(start: Any) -> Iterator[StepSlice]:
            for part in plan.slices(rank, world, start):
                lost = rank == 1 and part.step == 1
                yield replace(part, rows=part.rows[1:]) if lost else part

        ctx = WorkerContext(run_dir=self.root / "lost", rank=rank, world=world, say=_quiet)
        fit(self.toy, cfg, ctx, slices)

    def full_disk(self, rank: int, go: Any) -> None:
        real = checkpoint.save
        if rank == 0:
            checkpoint.save = _full
        try:
            go("full", self.toy, config(batch_size=4))
        finally:
            checkpoint.save = real


def _quiet(text: str) -> None:
    pass


def _full(*args: Any, **kwargs: Any) -> Path:
    raise NoSpace("the disk is full")


class counted_syncs:  # noqa: N801
    """While open, every gradient exchange of a new DDP model adds to the list."""

    def __enter__(self) -> list[int]:
        self.real, calls = precision._wrap_ddp, []

        def wrap(*args: Any) -> Any:
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

            def hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations
                calls.append(1)
                return allreduce_hook(state, bucket)

            model = self.real(*args)
            model.register_comm_hook(None, hook)
            return model

        precision._wrap_ddp = wrap
        return calls

    def __exit__(self, *details: object) -> None:
        precision._wrap_ddp = self.real


@contextmanager
def counted_calls(owner: Any, name: str) -> Iterator[list[int]]:
    """While open, every call of ``owner.name`` adds to the list."""
    real, calls = getattr(owner, name), []

    def counted(*args: Any) -> Any:
        calls.append(1)
        return real(*args)

    setattr(owner, name, counted)
    try:
        yield calls
    finally:
        setattr(owner, name, real)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("two")
    runs = Runs(root, write_toy(root / "data"))
    spawn(runs, root)
    run(runs.toy, config(), root / "one")
    return runs


def same_losses(runs: Runs, ours: str, one: str) -> None:
    for kind in ("step", "epoch"):
        expected = losses(runs.root / one, kind)
        assert losses(runs.root / ours, kind) == pytest.approx(expected, rel=1e-5)
    assert grad_norms(runs.root / ours) == pytest.approx(grad_norms(runs.root / one), rel=1e-4)
    a, b = (load_model_state(runs.root / name / "last") for name in (ours, one))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["two", "accumulated", "reentrant-False", "reentrant-True", "throttled", "to-two"]
)
def test_two_workers_equal_one_with_twice_the_batch(runs: Runs, name: str) -> None:
    same_losses(runs, name, "one")


def test_a_worker_that_was_dealt_no_row_takes_part(runs: Runs) -> None:
    run(replace(runs.toy, n_train=41), config(), runs.root / "idle-one")
    same_losses(runs, "idle", "idle-one")
    run(replace(runs.toy, n_train=1, n_val=1), config(), runs.root / "few-one")
    same_losses(runs, "few", "few-one")


def test_validation_counts_each_row_once(runs: Runs) -> None:
    for name, n, total in (("two", 7, sum(range(43, 50))), ("few", 1, 43)):
        epochs = [r for r in records(runs.root / name) if r["kind"] == "epoch"]
        assert {(r["val_n"], r["val_rows"]) for r in epochs} == {(n, total)}


def test_gradients_are_exchanged_once_a_step(runs: Runs) -> None:
    assert runs.noted("syncs") == [18, 18]  # one bucket; 35 micro batches without no_sync


def test_one_rank_that_wants_to_stop_stops_both(runs: Runs) -> None:
    assert runs.noted("stopped") == [True, True]


def test_a_resumed_pair_equals_the_unbroken_pair(runs: Runs) -> None:
    assert losses(runs.root / "noisy-broken") == losses(runs.root / "noisy")
    assert losses(runs.root / "noisy-broken", "epoch") == losses(runs.root / "noisy", "epoch")
    assert losses(runs.root / "noisy") != losses(runs.root / "two")


def test_a_pair_saves_when_rank_0s_clock_says_so(runs: Runs) -> None:
    assert runs.noted("timed saves") == [3, 3]  # after steps 3, 6 (the epoch's end) and 9
    for kind in ("step", "epoch"):
        assert losses(runs.root / "noisy-timed", kind) == losses(runs.root / "noisy", kind)


def test_a_run_of_two_goes_on_as_one(runs: Runs) -> None:
    assert len(losses(runs.root / "to-one")) < 18
    run(runs.toy, config(batch_size=4), runs.root / "to-one")
    same_losses(runs, "to-one", "one")


def test_a_failure_of_one_is_known_to_both(runs: Runs) -> None:
    assert all("trained on 7 of its 8 rows" in text for text in runs.noted("lost row"))
    assert runs.noted("full disk") == ["NoSpace: the disk is full"] * 2
    assert all("MissingInput" in text for text in runs.noted("no data"))


def test_a_device_out_of_memory_ends_both_with_the_remedy(runs: Runs) -> None:
    for text in runs.noted("no memory"):
        assert text.startswith("MemoryBudgetExceeded: the device ran out of memory")
        assert "with several workers no step is redone" in text and "--accumulate" in text


def test_ranks_share_weights_and_draw_their_own_dropout(runs: Runs) -> None:
    assert len(set(runs.noted("weights"))) == 1
    assert len(set(runs.noted("dropout"))) == 2


def test_every_rank_reports_the_same(runs: Runs) -> None:
    first, second = runs.noted("reports")
    assert first == second == losses(runs.root / "reported", "epoch")
