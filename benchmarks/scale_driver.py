"""What one item, one image and one rank cost the driver: the measured constants of docs/scaling.md.

    python benchmarks/scale_driver.py [--items 4000] [--images 200000]

item_cpu_us_K         : CPU of the driver for a work item of 48 images, with K seats in the pool; the
                        seats share two actors that do nothing, so only the driver's side is real
plan_cpu_us_an_image, plan_bytes_an_image : list, names and work items of an extraction, as it holds
                        them while it runs (no files are looked at)
seal_cpu_us_an_image, seal_bytes_an_image : journals read, index built; bytes at the peak
plan_step_us          : CPU for one of 1,000 ranks' part of a step of 16,000 rows, by the hundreds;
                        plan_step_us_split: of rows that `split_rows` left, instead of a range
dataset_cpu_ms_a_rank, dataset_kib_a_rank : Ray Data's plan for one of 1,000 ranks (15 epochs of
                        62,500 steps), as the controller makes it
"""

from __future__ import annotations

import itertools
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import common
import numpy as np
import ray

from raypipe.cluster.datasets import plan_dataset
from raypipe.cluster.pool import PooledWorker, RayPool
from raypipe.cluster.session import open_session
from raypipe.extract.plan import Group, cut_items
from raypipe.runner import Done, Needs
from raypipe.store.commits import Commits, RowTable
from raypipe.store.index import index_bytes
from raypipe.store.journal import CommitRecord, RowSource, header_line
from raypipe.store.layout import CellGrid
from raypipe.store.narrow import NarrowingError
from raypipe.store.schema import names_digest
from raypipe.stream import Cursor, StreamPlan, split_rows

SEATS = (4, 64, 256, 1000)
GRID, ROW_BYTES = 16, 257 * 1024 * 2


class Idle:
    """A worker for which every item is done at once."""

    def describe(self) -> None:
        return None

    def open(self, shared: Any) -> str:
        return ""

    def step(self, item: Any, upcoming: Any | None) -> list[Done]:
        return [Done(item.key)]

    def drain(self) -> list[Done]:
        return []

    def close(self) -> None:
        pass


class SharedActors(RayPool):
    """Many seats on two actors: what a thousand workers cost the driver, without a thousand."""

    def __enter__(self) -> RayPool:
        made = [ray.remote(PooledWorker).options(num_cpus=0).remote() for _ in range(2)]
        self._actors = itertools.cycle(made)
        return super().__enter__()

    def _seat(self, *, gives_way: bool = True) -> Any:
        seat = super()._seat(gives_way=gives_way)
        ray.kill(seat.actor, no_restart=True)
        seat.actor = next(self._actors)
        seat.loading = seat.actor.load.remote(self._make_ref, None, seat.name, gives_way=True)
        return seat


def group(images: int) -> Group:
    """As `raypipe extract` finds it in a folder of that many."""
    folder = Path("/data/images")
    return Group("images", "train", tuple(folder / f"image-{i:09d}.jpg" for i in range(images)))


def items(found: Group, workers: int) -> list[Any]:
    """Its work items."""
    missing = [(lo, lo + GRID) for lo in range(0, len(found.paths), GRID)]
    joined = [(missing[0][0], missing[-1][1])]
    return cut_items(found, joined, grid=GRID, row_bytes=ROW_BYTES, workers=workers)


def item_cpu_us(seats: int, count: int) -> float:
    """CPU of the driver for an item, when every seat has one."""
    work = items(group(48 * (count + 4 * seats)), 1)
    with SharedActors(Idle, Needs(workers=seats, cpus=0)) as pool:
        done = pool.run(work, None)
        for _ in range(2 * seats):  # until all have begun
            next(done)
        before = time.process_time()
        for _ in range(count):
            next(done)
        return (time.process_time() - before) / count * 1e6


def peak_bytes() -> int:
    """The most that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_a_child(measure: Callable[..., dict[str, float]], *args: object) -> dict[str, float]:
    """In a process that never held anything else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        return child.submit(measure, *args).result()


def planning(images: int) -> dict[str, float]:
    """An image in the plan of an extraction."""
    peak, began = peak_bytes(), time.process_time()
    found = group(images)
    names = found.names
    names_digest(names)
    work = items(found, 1)
    waiting = {item.key for item in work}
    rows = {item.key: item.hi - item.lo for item in work}
    used = time.process_time() - began
    held = peak_bytes() - peak
    assert len(waiting) == len(rows)
    return {
        "plan_cpu_us_an_image": used / images * 1e6,
        "plan_bytes_an_image": held / images,
        "path_bytes_in_an_item": len(ray.cloudpickle.dumps(work[0])) / len(work[0].paths),
    }


def sealing(images: int, folder: Path) -> dict[str, float]:
    """An image in the journal, from the journal into the index."""
    grid = CellGrid(rows=images, grid=GRID, row_bytes=ROW_BYTES, data_offset=128)
    rng = np.random.default_rng(0)
    journal = folder / "00000001-w.jsonl"
    with journal.open("wb") as file:
        file.write(header_line("f" * 64, 1, "w"))
        for lo in range(0, images, GRID):
            digests = rng.bytes(16 * GRID).hex()
            file.write(_record(lo, [digests[32 * i :][:32] for i in range(GRID)]).to_line())
    names = [f"image-{i:09d}.jpg" for i in range(images)]
    peak, began = peak_bytes(), time.process_time()
    commits = Commits.read(grid, [journal], "f" * 64)
    table = RowTable.of(images, commits.lines())
    index = index_bytes(names, table)
    used, held = time.process_time() - began, peak_bytes() - peak
    return {
        "journal_bytes_an_image": journal.stat().st_size / images,
        "index_bytes_an_image": len(index) / images,
        "seal_cpu_us_an_image": used / images * 1e6,
        "seal_bytes_an_image": held / images,
    }


def _record(lo: int, digests: list[str]) -> CommitRecord:
    return CommitRecord(
        lo=lo,
        hi=lo + len(digests),
        checksum=f"{lo * 0x9E3779B97F4A7C15 % 2**64:016x}",
        attempt=1,
        epoch=1,
        writer="1234567-0123456789ab",
        batch=GRID,
        error=NarrowingError(0.00048828125, 0.00048828125, 0.00390625),
        sources=tuple(RowSource(digest, 100_000 + lo % 9973) for digest in digests),
    )


def order_step_us(plan: StreamPlan) -> float:
    """CPU of one of 1,000 ranks for its part of a step."""
    began = time.process_time()
    steps = 4096  # some 16 of the pieces in which the order is computed
    for _ in itertools.islice(plan.slices(0, 1000, Cursor()), steps):
        pass
    return (time.process_time() - began) / steps * 1e6


def training() -> dict[str, float]:
    """The plan of 10**9 rows in steps of 1,000 times 16."""
    plan = StreamPlan(range(10**9), 0, 16_000, 15)
    step_us = order_step_us(plan)
    split_us = order_step_us(StreamPlan(split_rows(10**9, 10**8, 0)[0], 0, 16_000, 15))
    began, ranks = time.process_time(), 4
    made = [plan_dataset(plan, rank, 1000, Cursor()).iterator() for rank in range(ranks)]
    used = time.process_time() - began
    return {
        "plan_step_us": step_us,
        "plan_step_us_split": split_us,
        "dataset_cpu_ms_a_rank": used / ranks * 1e3,
        "dataset_kib_a_rank": len(ray.cloudpickle.dumps(made[0])) / 1024,
    }


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--items", type=int, default=4000)
    parser.add_argument("--images", type=int, default=200_000)
    options = parser.parse_args()
    metrics: dict[str, object] = {**in_a_child(planning, options.images)}
    with tempfile.TemporaryDirectory() as folder:
        metrics |= in_a_child(sealing, options.images, Path(folder))
    common.say(str(metrics))
    with open_session():
        metrics |= training()
        common.say(str(metrics))
        for seats in SEATS:
            metrics[f"item_cpu_us_{seats}"] = item_cpu_us(seats, options.items)
            common.say(f"{seats} seats: {metrics[f'item_cpu_us_{seats}']:.0f} us an item")
    common.emit("scale_driver", metrics, options.json)


if __name__ == "__main__":
    main()
