"""Where a run's rows are read, and how they are listed, changes nothing about the run."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from train_helpers import N_TRAIN, ToyTask, config, run, write_toy

from raypipe.errors import ConfigError
from raypipe.stream import RowRange, SplitRows, WindowShuffle, split_rows
from raypipe.stream.reading import RowReader, Source
from raypipe.train.feed import training_plan
from raypipe.train.result import FitResult


class FarRows:
    """A file's rows, brought a batch at a time as another node would."""

    def __init__(self, source: Source) -> None:
        self.source, self._mapped = source, source.open()
        self.asked = 0

    def check(self, rows: np.ndarray) -> None:
        self._mapped.check(rows)

    def start(self, rows: np.ndarray) -> Callable[[], np.ndarray]:
        self.asked += rows.size
        return lambda: self._mapped.array[rows]  # type: ignore[union-attr]


def losses(result: FitResult) -> list[tuple[float, float]]:
    return [(epoch["train_loss"], epoch["val_loss"]) for epoch in result.history]


def test_training_and_validation_read_where_the_context_says(tmp_path: Path) -> None:
    toy, opened = write_toy(tmp_path / "toy"), list[FarRows]()

    def open_rows(source: Source) -> RowReader:
        opened.append(FarRows(source))
        return opened[-1]

    far = run(toy, config(), tmp_path / "far", open_rows=open_rows)
    near = run(toy, config(), tmp_path / "near")
    assert losses(far) == losses(near)
    assert len(opened) == 2 * len(toy.sources())
    assert all(reader.asked for reader in opened)


@dataclass(frozen=True)
class RangeTask(ToyTask):
    """The same rows, without a list of them."""

    @property
    def train_rows(self) -> range:  # type: ignore[override]
        return range(self.n_train)


def test_a_task_may_give_a_range_of_rows(tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "toy")
    listed = run(toy, config(), tmp_path / "listed")
    measured = config(predict_memory=True)  # which takes rows of its own
    ranged = run(RangeTask(toy.data), measured, tmp_path / "range")
    assert losses(ranged) == losses(listed)


@dataclass(frozen=True)
class SplitTask(ToyTask):
    """Some of the rows, and those held out of them, computed or as lists of the same."""

    listed: bool = False

    @property
    def train_rows(self) -> SplitRows | np.ndarray:  # type: ignore[override]
        left, _ = split_rows(self.n_train, 6, 1)
        return left[:] if self.listed else left

    @property
    def val_rows(self) -> SplitRows | np.ndarray:  # type: ignore[override]
        _, held = split_rows(self.n_train, 6, 1)
        return held[:] if self.listed else held


def test_a_task_may_give_rows_that_a_seed_left(tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "toy")
    listed = run(SplitTask(toy.data, listed=True), config(), tmp_path / "listed")
    measured = config(predict_memory=True)
    computed = run(SplitTask(toy.data), measured, tmp_path / "computed")
    assert losses(computed) == losses(listed)
    first = config(epochs=1)
    run(SplitTask(toy.data), first, tmp_path / "parts")
    assert losses(run(SplitTask(toy.data), config(), tmp_path / "parts")) == losses(computed)
    with pytest.raises(ConfigError, match="other rows"):
        run(toy, config(epochs=9), tmp_path / "computed")


def test_a_plan_of_a_range_lists_no_rows() -> None:
    tracemalloc.start()
    plan = training_plan(range(10**9), config(batch_size=16), 2)
    rows = plan.step_rows(2, plan.steps_per_epoch - 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(plan.rows, RowRange)
    assert rows.max() < 10**9
    assert peak < 1 << 20


SEEN: list[int] = []


@dataclass(frozen=True)
class Noting(ToyTask):
    """Notes the rows that it trains on, in their order."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if torch.is_grad_enabled():
            SEEN.extend(batch["row"].tolist())
        return super().loss(model, batch)


def test_training_in_windows_sees_their_rows_in_turn_and_does_not_resume_without(
    tmp_path: Path,
) -> None:
    SEEN.clear()
    task = Noting(write_toy(tmp_path / "toy").data)
    run(task, config(epochs=2, shuffle_window=16, seed=5), tmp_path / "run")
    orders = [WindowShuffle(N_TRAIN, 16, (5, epoch))(np.arange(N_TRAIN)) for epoch in (0, 1)]
    assert np.array_equal(SEEN, np.concatenate(orders))
    with pytest.raises(ConfigError, match="shuffle_window 16 -> None"):
        run(task, config(epochs=3, seed=5), tmp_path / "run")


def test_a_window_is_asked_for_together() -> None:
    assert config(batch_size=8).read_ahead(1) is None
    assert config(batch_size=8, shuffle_window=100).read_ahead(1) == 13
    assert config(batch_size=8, shuffle_window=100).read_ahead(4) == 4
