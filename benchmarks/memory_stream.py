"""Batches gathered from a memory map by a Ray actor, under its budget or not: benchmarks/memory.py."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray

from raypipe.cluster.budget import WorkerMemory, budgeted
from raypipe.memory.config import resolve
from raypipe.memory.guard import NoGuard, guarding, note
from raypipe.stream import ArraySource, Gatherer

ROWS, TOKENS, DIM, BATCH = 600, 962, 768, 16


class Reader:
    """Delivers random batches of 16 x 962 x 768 float16, as training takes them."""

    def __init__(self, path: Path, run_dir: Path) -> None:
        self.source = ArraySource.npy(path)
        self.order = WorkerMemory(memory=resolve(), per_node=1, run_dir=run_dir)

    def compare(self, rounds: int, seconds: float) -> list[float]:
        """Ratios of batches a second with budget, lease, watch and log over those with none.

        The two take turns, over the same buffers: on a shared machine a rate holds for a second.
        """
        ratios = []
        with Gatherer({"tokens": self.source}, BATCH) as gatherer:
            batches = gatherer.batches(_rows())
            for _ in range(50):  # the page cache, the buffers and the map, warm
                next(batches)
            for turn in range(rounds):
                rates = {}
                for on in (True, False) if turn % 2 else (False, True):
                    with budgeted(self.order, "reader") if on else guarding(NoGuard()) as guard:
                        rates[on] = _deliver(batches, guard, seconds)
                ratios.append(rates[True] / rates[False])
        return ratios


def _deliver(batches: Iterator[Any], guard: Any, seconds: float) -> float:
    """Batches a second, each with what a boundary between two batches asks and says."""
    count, began = 0, time.monotonic()
    for _ in batches:
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


def throughput_ratio(folder: Path, rounds: int = 100, seconds: float = 0.4) -> tuple[float, float]:
    """Batches/s with budgets on over off: the median of the rounds' ratios, and half the range
    that holds it in 95 of 100 repetitions (bootstrap).
    """
    path = folder / "rows.npy"
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(ROWS, TOKENS, DIM))
    array[:] = 1
    array.flush()
    del array
    actor = ray.remote(Reader).options(num_cpus=1).remote(path, folder / "run")
    ratios = np.array(ray.get(actor.compare.remote(rounds, seconds)))
    ray.kill(actor)
    again = np.random.default_rng(0).choice(ratios, (2000, rounds))
    low, high = np.percentile(np.median(again, axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(high - low) / 2
