"""Batches gathered from a memory map by a Ray actor, under its budget or not: benchmarks/memory.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray

from raypipe.cluster.budget import WorkerMemory, budgeted
from raypipe.memory.config import resolve
from raypipe.memory.guard import NoGuard, note
from raypipe.stream import ArraySource, Gatherer

ROWS, TOKENS, DIM, BATCH = 600, 962, 768, 16


class Reader:
    """Delivers random batches of 16 x 962 x 768 float16, as training takes them."""

    def __init__(self, path: Path, run_dir: Path) -> None:
        self.source = ArraySource.npy(path)
        self.order = WorkerMemory(memory=resolve(), per_node=1, run_dir=run_dir)

    def deliver(self, seconds: float, watched: bool) -> float:
        """Batches a second, with budget, lease, watch and log, or with none of them."""
        if not watched:
            return self._deliver(seconds, NoGuard())
        with budgeted(self.order, "reader") as guard:
            return self._deliver(seconds, guard)

    def _deliver(self, seconds: float, guard: Any) -> float:
        count, began = 0, time.monotonic()
        with Gatherer({"tokens": self.source}, BATCH) as gatherer:
            for _ in gatherer.batches(_rows()):
                guard.pressure()
                note(step=count, batch=BATCH, phase="train")
                count += 1
                if time.monotonic() - began >= seconds:
                    break
        return count / (time.monotonic() - began)


def _rows() -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    while True:
        yield rng.integers(0, ROWS, BATCH)


def throughput_ratio(folder: Path, rounds: int = 7, seconds: float = 3.0) -> float:
    """Batches/s with budgets on over off: the two take turns, the median of the rounds' ratios."""
    path = folder / "rows.npy"
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(ROWS, TOKENS, DIM))
    array[:] = 1
    array.flush()
    del array
    actor = ray.remote(Reader).options(num_cpus=1).remote(path, folder / "run")
    ray.get(actor.deliver.remote(seconds, False))  # the page cache, warm
    ratios = []
    for turn in range(rounds):
        first, second = (True, False) if turn % 2 else (False, True)
        rates = {on: ray.get(actor.deliver.remote(seconds, on)) for on in (first, second)}
        ratios.append(rates[True] / rates[False])
    ray.kill(actor)
    return statistics.median(ratios)
