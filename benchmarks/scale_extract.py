"""The extraction of benchmarks/scale.py: `raypipe extract` as it is, with a backbone that sleeps.

Real: the plan, the pool of actors, the items and their acknowledgements, decoding, the journals with
their flushes, the memory actors, sealing. Not real: the forward pass, which sleeps, and the size of
a row (a few kB), so that one disk can stand for the file system of all nodes. A work item is one
batch, as it is where 16 rows are ITEM_BYTES.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from raypipe.backbone.model import Backbone
from raypipe.cluster.runner import RayRunner
from raypipe.extract import plan
from raypipe.extract.config import ExtractConfig
from raypipe.extract.run import extract
from raypipe.runner import Done, Needs, Pool, StepWorker

BATCH = 16
SIDE = 32  # pixels: decoding is a cost of each node's own, and here all share two cores
DISTINCT = 50


@dataclass(frozen=True)
class Rate:
    """Rows a second in the steady state, what came before it, and the driver's work in it.

    start_s : from the call to the moment at which the last worker had its first batch behind it.
    """

    rows_per_s: float
    start_s: float
    driver_cpu_s: float
    items: int


def make_images(folder: Path, n: int) -> Path:
    """``n`` PNG images of ``SIDE`` pixels, most of them links to a few."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        path = folder / f"image-{i:06d}.png"
        if i < DISTINCT:
            pixels = rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)
            Image.fromarray(pixels).save(path, compress_level=1)
        else:
            path.hardlink_to(folder / f"image-{i % DISTINCT:06d}.png")
    return folder


def run(
    runner: RayRunner, images: Path, root: Path, *, nodes: int, step_s: float
) -> tuple[Rate, Path]:
    """The rate with a worker on each of ``nodes`` nodes, and the store that came of it."""
    root.mkdir()
    asleep = _Asleep(runner, root / "batches", step_s)
    # One batch an item: with rows this small it would be a quarter of a worker's part of the run.
    before, plan.ITEM_BYTES = plan.ITEM_BYTES, 1
    began = time.monotonic()
    try:
        cfg = ExtractConfig(
            data_dir=images,
            output_dir=root / "out",
            backbone="resnet18",
            weights="random:0",
            image_size=SIDE,
            batch_size=BATCH,
            workers=nodes,
            decode_threads=1,
            device="cpu",
        )
        summary = extract(cfg, asleep)  # type: ignore[arg-type]
    finally:
        plan.ITEM_BYTES = before
    return asleep.rate(began, nodes), Path(summary.stores[0])


class _Asleep:
    """A runner whose extraction workers sleep; it notes when the driver learns of each item."""

    def __init__(self, runner: RayRunner, batches: Path, step_s: float) -> None:
        self._runner, self._batches, self._step_s = runner, batches, step_s
        self.learnt: list[tuple[float, float]] = []  # monotonic, CPU seconds of this process
        batches.mkdir()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    @contextmanager
    def pool(self, worker: Callable[[], StepWorker], needs: Needs) -> Iterator[Pool]:
        """The runner's own pool, of workers that sleep."""
        with self._runner.pool(_Sleeper(worker, self._batches, self._step_s), needs) as pool:
            yield _Watched(pool, self.learnt)

    def rate(self, began: float, nodes: int) -> Rate:
        """From when all workers worked until the first had no more to do: items that were durable."""
        ends = [
            [json.loads(line) for line in log.read_text().splitlines()]
            for log in self._batches.iterdir()
        ]
        if len(ends) != nodes:
            raise SystemExit(f"{len(ends)} workers took part, not {nodes}: the rate says nothing")
        first, last = max(each[0] for each in ends), min(each[-1] for each in ends)
        within = [(at, cpu) for at, cpu in self.learnt if first < at <= last]
        (at_first, cpu_first), (at_last, cpu_last) = within[0], within[-1]
        items = len(within) - 1
        return Rate(
            rows_per_s=items * BATCH / (at_last - at_first),
            start_s=first - began,
            driver_cpu_s=cpu_last - cpu_first,
            items=items,
        )


@dataclass(frozen=True)
class _Sleeper:
    """Makes the real worker, then puts its backbone to sleep; called where the actor lands."""

    make: Callable[[], StepWorker]
    batches: Path
    step_s: float

    def __call__(self) -> StepWorker:
        worker = self.make()
        log, kept, step_s = self.batches / str(os.getpid()), {}, self.step_s
        forward = Backbone.forward

        def sleep(self: Backbone, batch: torch.Tensor) -> dict[str, torch.Tensor]:
            if not kept:  # for the shapes
                kept.update(forward(self, batch))
            time.sleep(step_s)
            with log.open("a") as file:
                file.write(f"{time.monotonic()}\n")
            return {layer: tokens[: len(batch)] for layer, tokens in kept.items()}

        Backbone.forward = sleep  # type: ignore[method-assign]
        return worker


class _Watched:
    """A pool, each item of which is timed when the driver has it."""

    def __init__(self, pool: Pool, learnt: list[tuple[float, float]]) -> None:
        self._pool, self._learnt = pool, learnt

    def describe(self) -> Any:
        return self._pool.describe()

    def run(
        self, items: Sequence[Any], shared: Any, *lost: Callable[[Any], None]
    ) -> Iterator[Done]:
        for done in self._pool.run(items, shared, *lost):
            self._learnt.append((time.monotonic(), time.process_time()))
            yield done
