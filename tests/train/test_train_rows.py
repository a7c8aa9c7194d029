"""Where a run's rows are read, and how they are listed, changes nothing about the run."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from train_helpers import ToyTask, config, run, write_toy

from raypipe.stream import RowRange
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


def test_a_plan_of_a_range_lists_no_rows() -> None:
    tracemalloc.start()
    plan = training_plan(range(10**9), config(batch_size=16), 2)
    rows = plan.step_rows(2, plan.steps_per_epoch - 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(plan.rows, RowRange)
    assert rows.max() < 10**9
    assert peak < 1 << 20
