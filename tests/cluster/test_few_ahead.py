"""Descriptors are made a few blocks ahead of their reader, not all at once."""

from __future__ import annotations

import itertools
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from raypipe.cluster import few_ahead
from raypipe.cluster.datasets import PlanSource
from raypipe.cluster.few_ahead import BLOCKS, FewAhead, stay_few_ahead
from raypipe.stream import Cursor, StreamPlan

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests


@pytest.mark.parametrize(
    ("waiting", "under_way", "begins", "pauses"),
    [
        (0, 0, True, 0),
        (BLOCKS - 1, 0, True, 0),
        (0, BLOCKS, False, 0),  # the scheduling loop waits for those
        (BLOCKS - 1, 1, False, 0),
        (BLOCKS, 0, False, 1),  # nobody else would make it wait
    ],
)
def test_the_rule(
    monkeypatch: pytest.MonkeyPatch, waiting: int, under_way: int, begins: bool, pauses: int
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(few_ahead.time, "sleep", slept.append)
    op = SimpleNamespace(input_dependencies=[object()], num_active_tasks=lambda: under_way)
    state = SimpleNamespace(total_enqueued_output_blocks=lambda: waiting)
    policy: Any = FewAhead.__new__(FewAhead)
    policy._topology = _ByIdentity(op, state)
    assert policy.can_add_input(op) is begins
    assert slept == [few_ahead.PAUSE_S] * pauses


class _ByIdentity:
    """Ray's operators may be keys; a namespace may not."""

    def __init__(self, op: object, state: object) -> None:
        self._op, self._state = op, state

    def __getitem__(self, op: object) -> object:
        assert op is self._op
        return self._state


@given(
    rows=st.integers(1, 10**7),
    per_step=st.integers(1, 5000),
    epochs=st.integers(1, 50),
    world=st.integers(1, 5),
)
def test_blocks_follow_one_another_and_grow(
    rows: int, per_step: int, epochs: int, world: int
) -> None:
    plan = StreamPlan(range(rows), 0, per_step, epochs)
    start = Cursor(epochs - 1, plan.steps_per_epoch - 1) if epochs % 2 else Cursor()
    source: Any = PlanSource.__new__(PlanSource)
    source.cut(plan, world, start)
    spans = source.spans
    total = epochs * plan.steps_per_epoch
    assert spans[0][0] == start.epoch * plan.steps_per_epoch + start.step
    assert spans[-1][1] == total
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    sizes = [hi - lo for lo, hi in spans]
    assert sizes[:-1] == sorted(sizes[:-1])
    assert all(b <= 2 * a for a, b in itertools.pairwise(sizes))


class _Counted(Datasource):
    """Blocks that leave a file each when they are made."""

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__()
        self._folder, self._count = folder, count

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        meta = BlockMetadata(num_rows=1, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(_made, self._folder, k), meta) for k in range(self._count)]


def _made(folder: Path, number: int) -> list[pa.Table]:
    (folder / str(number)).touch()
    return [pa.table({"number": [number]})]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_ray_data_stays_few_blocks_ahead_of_a_slow_reader(tmp_path: Path) -> None:
    count = 40
    dataset = ray.data.read_datasource(
        _Counted(tmp_path, count), num_cpus=0.01, override_num_blocks=count
    )
    stay_few_ahead(dataset)
    assert dataset.context.execution_no_progress_timeout_s == -1  # a slow reader is no fault
    dataset.context.execution_options.preserve_order = True
    batches = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
    got = [next(batches)["number"].to_pylist()]
    time.sleep(2.0)
    ahead = len(list(tmp_path.iterdir()))
    got += [batch["number"].to_pylist() for batch in batches]
    assert got == [[number] for number in range(count)]
    assert 2 <= ahead <= 3 * BLOCKS  # those given out and fetched ahead of the reader included
