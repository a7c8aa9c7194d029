"""Ray Data as the transport of row-index descriptors to the Train workers.

A descriptor is one training step of one rank: (epoch, step, size of the whole step, this rank's
rows). Ray's own split deals blocks to whichever worker asks first and drops rows to make the
parts equal; here every rank gets a dataset of its own, cut by the plan, so no row is lost or
repeated and the order does not depend on timing. What a descriptor is made of, and what makes it in
a read task, is in ``steps``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataIterator, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.train import DataConfig

from raypipe.cluster.few_ahead import stay_few_ahead
from raypipe.cluster.session import before_end, hush
from raypipe.cluster.steps import SCHEMA, read_steps, table_slices
from raypipe.errors import WorkerFailed
from raypipe.stream import Cursor, StepSlice, StreamPlan

# One block carries many steps: a block costs a task and a round trip, a step a few hundred bytes. The
# first ones are waited for: they are small.
FIRST_ROWS_PER_BLOCK, MAX_ROWS_PER_BLOCK = 1 << 16, 1 << 20
FIRST_STEPS_PER_BLOCK, MAX_STEPS_PER_BLOCK = 1 << 9, 1 << 13
# Descriptors cost microseconds: the workers must not be kept waiting for a whole free core.
READ_CPUS = 0.01


class PlanSource(Datasource):
    """The steps of ``rank`` of ``world`` from ``start`` on, as Arrow blocks of many steps each."""

    def __init__(self, plan: StreamPlan, rank: int, world: int, start: Cursor) -> None:
        super().__init__()
        self._plan_ref = ray.put(plan)  # once, not once a read task
        self._rank = rank
        self.cut(plan, world, start)

    def cut(self, plan: StreamPlan, world: int, start: Cursor) -> None:
        """Decide the blocks: `spans`."""
        self._epochs, self._steps = plan.epochs, plan.steps_per_epoch
        self._world, self._start = world, start
        per_rank = max(1, plan.rows_per_step // world)
        self._first_block = max(1, min(FIRST_STEPS_PER_BLOCK, FIRST_ROWS_PER_BLOCK // per_rank))
        self._max_block = max(1, min(MAX_STEPS_PER_BLOCK, MAX_ROWS_PER_BLOCK // per_rank))

    def get_name(self) -> str:
        return f"StreamPlan[{self._rank}/{self._world}]"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    @property
    def spans(self) -> list[tuple[int, int]]:
        """[first, last) global step numbers of each block, epoch after epoch without a seam."""
        at, total = self._start.epoch * self._steps + self._start.step, self._epochs * self._steps
        found, size = [], self._first_block
        while at < total:
            found.append((at, min(at + size, total)))
            at, size = at + size, min(2 * size, self._max_block)
        return found

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        return [self._read_task(lo, hi) for lo, hi in self.spans]

    def _read_task(self, lo: int, hi: int) -> ReadTask:
        read = partial(read_steps, self._plan_ref, self._rank, self._world, lo, hi)
        meta = BlockMetadata(num_rows=hi - lo, size_bytes=None, input_files=None, exec_stats=None)
        return ReadTask(read, meta, schema=SCHEMA)


def plan_dataset(plan: StreamPlan, rank: int, world: int, start: Cursor) -> ray.data.Dataset:
    """The descriptors of one rank as a Ray dataset in plan order."""
    source = PlanSource(plan, rank, world, start)
    dataset = ray.data.read_datasource(
        source,
        num_cpus=READ_CPUS,
        # Fewer blocks than read tasks would split tasks' outputs anew.
        override_num_blocks=max(1, len(source.spans)),
    )
    stay_few_ahead(dataset)
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    return dataset


class PlanDataConfig(DataConfig):
    """Gives each Train worker the dataset of its own rank.

    start : asked anew at every (re)start of the worker group, so a restart reads on where the
    last whole checkpoint stands, whatever the number of workers.
    """

    def __init__(self, plan: StreamPlan, start: Callable[[], Cursor]) -> None:
        super().__init__()
        self._plan, self._start = plan, start

    def configure(
        self,
        datasets: dict[str, ray.data.Dataset],
        world_size: int,
        worker_handles: Any,
        worker_node_ids: Any,
        **kwargs: Any,
    ) -> list[dict[str, DataIterator]]:
        start = self._start()
        return [
            {"train": plan_dataset(self._plan, rank, world_size, start).iterator()}
            for rank in range(world_size)
        ]


def read_slices(shard: DataIterator) -> Generator[StepSlice, None, None]:
    """The step slices that arrive on this worker's dataset shard.

    Left open when its session ends, it is closed there: what Ray Data does when it is let go, or
    asked for more, would start a second Ray. Raises WorkerFailed when Ray is gone meanwhile.
    """
    slices = _slices(shard)
    _open.add(slices)
    return slices


def _slices(shard: DataIterator) -> Generator[StepSlice, None, None]:
    tables = iter(shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))
    try:
        while (table := _next_table(tables)) is not None:
            yield from table_slices(table)
    finally:
        if ray.is_initialized():
            tables.close()
        else:
            _stranded.append(tables)


def _next_table(tables: Iterator[pa.Table]) -> pa.Table | None:
    if not ray.is_initialized():
        raise WorkerFailed(
            "Ray was shut down under a stream of descriptors; read it to its end, or close it, inside "
            "the session"
        )
    return next(tables, None)


def close_open_slices() -> None:
    """Close what `read_slices` gave and nobody closed; `open_session` calls it before its end."""
    for slices in list(_open):
        with suppress(ValueError):  # another thread is in the middle of it
            slices.close()


_open: weakref.WeakSet[Generator[StepSlice, None, None]] = weakref.WeakSet()
# Kept for ever: to let go of one calls Ray, which is gone and would start again.
_stranded: list[Any] = []
before_end(close_open_slices)
hush()  # Ray Data's logger, whose level came with it
