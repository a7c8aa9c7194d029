"""Our loaders for benchmarks/stream.py, and the memory copy that bounds them.

``Plain`` needs no Ray: `FeatureLoader` where this checkout has it, else a `Gatherer` fed by a
`StreamPlan`; ``windowed`` is the same with a shuffle window. ``ThroughRay`` feeds a `Gatherer` with
the descriptors that arrive through Ray Data, as a Train worker does; the time between its batches is
kept, for the pause between epochs.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
from stream_peers import Turn

import raypipe.stream as stream
from raypipe.stream import ArraySource, Cursor, Gatherer, StepSlice, StreamPlan

FASTEST = 40e9  # bytes/s: the plan through Ray Data is made long enough for this
SOURCE_BYTES = 2_000_000_000  # of the limit at most: a file up to this size is matched
GATHER_THREADS = "raypipe-gather"


def gather_threads() -> int:
    """Threads that gather in this process now: the limit is measured with as many."""
    named = [t for t in threading.enumerate() if t.name.startswith(GATHER_THREADS)]
    return max(1, len(named))


class Plain:
    """Batches by our plain loader, epoch after epoch; ``window``: 0, or rows to shuffle within."""

    def __init__(self, turn: Turn, threads: int | None = None, window: int = 0) -> None:
        self._turn, self._threads, self._window = turn, threads, window
        self.api = "FeatureLoader" if hasattr(stream, "FeatureLoader") else "Gatherer"

    def __iter__(self) -> Iterator[Any]:
        return self._loader() if self.api == "FeatureLoader" else self._gatherer()

    def _loader(self) -> Iterator[Any]:
        sources = {"x": ArraySource.npy(self._turn.npy)}
        loader = stream.FeatureLoader(
            sources, self._turn.rows.batch, seed=0, threads=self._threads, window=self._window
        )
        epoch = 0
        while True:
            loader.set_epoch(epoch)
            for batch in loader:
                yield batch["x"]
            epoch += 1

    def with_threads(self, threads: int) -> Plain:
        """The same, gathered by so many threads."""
        return Plain(self._turn, threads)

    def _gatherer(self) -> Iterator[Any]:
        turn = self._turn
        plan = _plan(turn, epochs=2**31)
        source = {"x": ArraySource.npy(turn.npy)}
        with Gatherer(source, turn.rows.batch, threads=self._threads) as gatherer:
            rows = (part.rows for part in plan.slices(0, 1, Cursor()))
            for batch in gatherer.batches(rows):
                yield batch["x"]


def _plan(turn: Turn, epochs: int) -> StreamPlan:
    return StreamPlan(
        range(turn.n),
        seed=0,
        rows_per_step=turn.rows.batch,
        epochs=epochs,
    )


class ThroughRay:
    """Batches of rows whose numbers come through Ray Data, in a Ray session of its own."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._epochs: list[int] = []
        self._times: list[float] = []
        self.api = "plan_dataset"

    def __iter__(self) -> Iterator[Any]:
        from raypipe.cluster.datasets import plan_dataset, read_slices
        from raypipe.cluster.session import open_session

        turn = self._turn
        file_bytes = turn.n * turn.rows.row_bytes
        plan = _plan(turn, epochs=2 + int(FASTEST * turn.seconds / file_bytes))
        with open_session():
            shard = plan_dataset(plan, 0, 1, Cursor()).iterator()
            # Closed inside the session: what Ray Data does at its end would start a second one.
            with (
                closing(read_slices(shard)) as slices,
                Gatherer({"x": ArraySource.npy(turn.npy)}, turn.rows.batch) as gatherer,
                closing(self._rows(slices)) as rows,
                closing(gatherer.batches(rows)) as batches,
            ):
                for batch in batches:
                    self._times.append(time.perf_counter())
                    yield batch["x"]
        raise SystemExit(f"the plan of {plan.epochs} epochs came to its end before the turn did")

    def _rows(self, slices: Iterator[StepSlice]) -> Generator[np.ndarray, None, None]:
        for part in slices:
            self._epochs.append(part.epoch)
            yield part.rows

    def forget(self) -> int:
        """Batches delivered so far: ``gaps_ms`` counts from there."""
        return len(self._times)

    def gaps_ms(self, first: int, last: int) -> list[float]:
        """From an epoch's last batch to the next one's first, ms, in batches [first, last)."""
        return [
            1000 * (self._times[i] - self._times[i - 1])
            for i in range(first + 1, last)
            if self._epochs[i] != self._epochs[i - 1]
        ]


class Memcpy:
    """Copies of batches into one reused buffer, by one thread or several.

    The source is as large as the file and walked through, as its rows are: one batch copied again
    and again would come from the processor's cache (``cached``, shown beside the limit).
    """

    def __init__(self, batch_bytes: int, threads: int, file_bytes: int) -> None:
        count = max(2, min(file_bytes, SOURCE_BYTES) // batch_bytes)
        self._source = np.ones((count, batch_bytes), np.uint8)
        self._target = np.ones(batch_bytes, np.uint8)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="memcpy")
        self._next = 0

    def gbps(self, count: int, ways: int, *, cached: bool = False) -> float:
        """GB/s of ``count`` batches, each in ``ways`` pieces at once."""
        cuts = np.linspace(0, self._target.size, ways + 1).astype(int).tolist()
        pieces = [slice(lo, hi) for lo, hi in itertools.pairwise(cuts)]
        began = time.perf_counter()
        for _ in range(count):
            self._next += not cached
            source = self._source[self._next % len(self._source)]
            if ways == 1:
                np.copyto(self._target, source)
            else:
                list(self._pool.map(lambda p, s=source: np.copyto(self._target[p], s[p]), pieces))
        return count * self._target.size / (time.perf_counter() - began) / 1e9


def windowed(turn: Turn) -> Plain:
    """The plain loader with a shuffle window of the rows' own size."""
    return Plain(turn, window=turn.rows.window)


OURS = {"plain": Plain, "plain_window": windowed, "ray": ThroughRay}
