"""The class that becomes an actor of a pool: it holds one ordinary worker, and its budget.

Its calls are those of ``runner.StepWorker``, passed on; who makes them, and when, is ``pool``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import ray

from raypipe.cluster.awaited import Spot, here
from raypipe.cluster.budget import WorkerMemory, budgeted, is_younger
from raypipe.memory.guard import note
from raypipe.runner import Done, StepWorker


class PooledWorker:
    """One worker, from its lease to the end of its process."""

    def __init__(self) -> None:
        self._began = time.time()
        self._held = ExitStack()  # until the actor ends

    def where(self) -> Spot:
        """Asked before ``load``: who waits for that asks there what this one waits for."""
        return here()

    def load(
        self,
        make: Callable[[], StepWorker],
        order: WorkerMemory | None,
        name: str,
        *,
        gives_way: bool,
    ) -> tuple[int, str] | None:
        """Make the worker, under its budget; the process id, and the node's id.

        gives_way : return None instead where the node's memory actor came after this one.
        """
        if order is not None:
            guard = self._held.enter_context(budgeted(order, name))
            if gives_way and is_younger(guard, self._began):
                self._held.close()
                return None
            note(phase="load")
        self._worker = make()
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def describe(self) -> Any:
        return self._worker.describe()

    def open(self, shared: Any) -> Any:
        return self._worker.open(shared)

    def step(self, item: Any, upcoming: Any | None) -> list[Done]:
        return self._worker.step(item, upcoming)

    def drain(self) -> list[Done]:
        return self._worker.drain()
