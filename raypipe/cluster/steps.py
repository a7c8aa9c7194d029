"""Tables of descriptors: the steps of a plan as Arrow rows, and back.

A read task of Ray Data makes them in a process of its own, which a training waits for before its
first step. So nothing is imported here but what that takes: no ray.train, no torch. ``datasets``
makes the tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from raypipe.stream import Cursor, StepSlice, StreamPlan

SCHEMA = pa.schema(
    [
        ("epoch", pa.int64()),
        ("step", pa.int64()),
        ("global_rows", pa.int64()),
        ("rows", pa.list_(pa.int64())),
    ]
)


def read_steps(plan_ref: Any, rank: int, world: int, lo: int, hi: int) -> Iterator[pa.Table]:
    """What a read task does; ``plan_ref``: the plan in the object store."""
    yield step_table(ray.get(plan_ref), rank, world, lo, hi)


def step_table(plan: StreamPlan, rank: int, world: int, lo: int, hi: int) -> pa.Table:
    """Global steps [lo, hi) of ``rank`` as a table of ``SCHEMA``."""
    start = Cursor(*divmod(lo, plan.steps_per_epoch))
    slices = list(islice(plan.slices(rank, world, start), hi - lo))
    return pa.table(
        {
            "epoch": [part.epoch for part in slices],
            "step": [part.step for part in slices],
            "global_rows": [part.global_rows for part in slices],
            "rows": [part.rows for part in slices],
        },
        schema=SCHEMA,
    )


def table_slices(table: pa.Table) -> Iterator[StepSlice]:
    """The steps of a table of ``SCHEMA``."""
    rows = table["rows"].combine_chunks()
    flat, bounds = rows.flatten().to_numpy(), np.cumsum([0, *rows.value_lengths().to_pylist()])
    columns = zip(
        table["epoch"].to_pylist(),
        table["step"].to_pylist(),
        table["global_rows"].to_pylist(),
        bounds[:-1],
        bounds[1:],
        strict=True,
    )
    for epoch, step, global_rows, lo, hi in columns:
        yield StepSlice(
            epoch=epoch, step=step, global_rows=global_rows, rows=flat[lo:hi].astype(np.int64)
        )
