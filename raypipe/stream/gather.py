"""Batches of rows, read ahead: files, readers -> reused host buffers -> (on CUDA) device tensors.

A few background threads copy the next batches' rows, each batch in pieces, while the caller
computes on the present one. Row arrays are pulled from the caller's iterator in the caller's own
thread, at most ``depth - 1`` batches ahead (and ``read_ahead``), so the iterator needs no lock and
its errors surface where they belong.

Which rows: `raypipe.stream.plan`. What a source is: `raypipe.stream.source`. Where rows that
are in no file here come from: `raypipe.stream.reading`. What a batch is made of:
`raypipe.stream.layout`. Reading that is ahead of the pages: `raypipe.stream.ahead`. How a batch on
its way is waited for, or given up: `raypipe.stream.job`.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raypipe.errors import ConfigError, RaypipeError
from raypipe.stream.ahead import Ahead
from raypipe.stream.at_hand import open_at_hand
from raypipe.stream.buffers import Pool, Ring, Slot
from raypipe.stream.copy import STAGE_BYTES, copy_rows
from raypipe.stream.fetch import Fetch
from raypipe.stream.job import Job, abandon
from raypipe.stream.layout import Join, lay_out
from raypipe.stream.mapped import MappedRows
from raypipe.stream.reading import OpenRows, RowReader, Source
from raypipe.stream.source import as_source

if TYPE_CHECKING:
    import torch

    from raypipe.store import FeatureStore

# Less than this is copied sooner than a second thread wakes up.
_PIECE_BYTES = 1 << 20
# One thread may not fill the memory bus, more than a few do not fill it better. What two gain over
# one differs from run to run on a shared machine: benchmarks/stream.py.
_MOST_THREADS = 4


def default_threads() -> int:
    """Threads that gather: the cores that this process may use, at most 4."""
    return min(_MOST_THREADS, len(os.sched_getaffinity(0)) if _LINUX else os.cpu_count() or 1)


def ring_bytes(
    sources: Mapping[str, Source],
    max_rows: int,
    depth: int,
    *,
    dtype: str | torch.dtype | Mapping[str, str | torch.dtype] | None = None,
    join: Mapping[str, Join | tuple[tuple[str, ...], int]] | None = None,
    cast_on_device: bool = False,
) -> int:
    """Host bytes of a `Gatherer` of these, before there is one (stages of 512 KiB a thread apart).

    cast_on_device: on CUDA, where buffers hold the store's dtype.
    """
    outputs = lay_out(sources, dtype=dtype, join=join, cast_on_device=cast_on_device)
    return sum(output.row_bytes for output in outputs) * max_rows * depth


class Gatherer:
    """Reads batches from ``sources`` that share their row numbers (tokens, lh, rh, ...).

    ``sources``: name -> `ArraySource`, an open store, or the path of a ``.npy``. ``max_rows``: rows
    of the largest batch. ``depth``: batches in the ring, >= 2: one in the caller's hands, the
    others being read. Host memory: `buffer_bytes`, pinned when ``device`` is CUDA.

    ``threads``: that gather; None: `default_threads`. ``dtype``: what floating sources are cast to,
    or a mapping of names; on CUDA the device casts. ``join``: name -> (sources, axis) to be one
    tensor of that name, e.g. the features of two backbones. ``sort_reads``: read a batch in the
    order of the file (values stay in their places); None: when it is not in the page cache.
    ``read_ahead``: batches whose pages the kernel is asked for together, beyond those in the ring;
    None: 0. Batches in the ring that are seen to be cold are asked for unless it is 0.
    ``lend``: batches stay valid as long as anything refers to them (CPU; on CUDA they always do).
    ``open_rows``: opens a source, for rows that are not in a file here (`raypipe.stream.reading`);
    None: this process does, a copy on its node's disk where the catalog lists one. A reader is asked
    for every batch in the ring at once. ``say``: told of a source whose rows do not come, after 20 s and
    every minute from then on; None: stderr is.

    Close it, or use it in a ``with`` block. Raises as `as_source`, `open_at_hand` (or ``open_rows``)
    and `lay_out`, and ConfigError.
    """

    def __init__(
        self,
        sources: Mapping[str, Source | FeatureStore | Path | str],
        max_rows: int,
        device: str | torch.device = "cpu",
        depth: int = 3,
        *,
        threads: int | None = None,
        dtype: str | torch.dtype | Mapping[str, str | torch.dtype] | None = None,
        sort_reads: bool | None = None,
        read_ahead: int | None = None,
        join: Mapping[str, Join | tuple[tuple[str, ...], int]] | None = None,
        lend: bool = False,
        open_rows: OpenRows | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        import torch

        if not sources or max_rows < 1 or depth < 2:
            raise ConfigError(
                f"gatherer of {len(sources)} sources, max_rows={max_rows}, depth={depth}: give at "
                "least one source, one row and a depth of 2"
            )
        self.threads = default_threads() if threads is None else threads
        if self.threads < 1 or (read_ahead or 0) < 0:
            raise ConfigError(
                f"gatherer threads={threads}, read_ahead={read_ahead}: give at least one thread "
                "and no negative read-ahead"
            )
        self.sources = {name: as_source(source) for name, source in sources.items()}
        self.max_rows = max_rows
        self.device = torch.device(device)
        self.outputs = lay_out(self.sources, dtype=dtype, join=join, cast_on_device=self._on_cuda)
        self._maps: dict[str, MappedRows] = {}
        self._readers: dict[str, RowReader] = {}
        for name, source in self.sources.items():
            opened = (open_rows or open_at_hand)(source)
            if isinstance(opened, MappedRows):
                self._maps[name] = opened
            else:
                self._readers[name] = opened
        self._ahead = Ahead(self._maps.values(), sort_reads, read_ahead)
        self._slots = [self._new_slot() for _ in range(depth)]
        self._turns: Ring | Pool = Ring(self._slots)
        if lend and not self._on_cuda:
            self._turns = Pool(self._slots, self._new_slot)
        self._stream = torch.cuda.Stream(self.device) if self._on_cuda else None
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="raypipe-gather")
        self._say = say or _to_stderr
        self._busy = False
        self._pending: deque[Job] = deque()  # in the order of their batches

    @property
    def buffer_bytes(self) -> int:
        """Host bytes that the ring holds, and the threads' stages where batches are cast."""
        row_bytes = sum(output.row_bytes for output in self.outputs)
        staged = any(target.cast for target in self._slots[0].targets.values())
        return row_bytes * self.max_rows * len(self._slots) + staged * self.threads * STAGE_BYTES

    def batches(
        self, row_arrays: Iterable[np.ndarray]
    ) -> Generator[dict[str, torch.Tensor], None, None]:
        """One dict of tensors (n, *row_shape) for each array of rows (n,), in order.

        On the CPU the tensors are views of the ring: valid until the next one is asked for, unless
        they are lent. An error of reading is raised in place of the batch that it befell; where other
        sources of that batch failed too, what they say is in its notes (`raypipe.errors.together`).
        However it ends, a reader that hangs keeps it for about a second at most.
        """
        if self._busy:
            raise ConfigError("this Gatherer is already giving batches; open a second one")
        incoming = self._ahead.through(iter(row_arrays))
        # A caller that is lent batches holds one while it asks for the next: one fewer in flight.
        most = len(self._slots) - isinstance(self._turns, Pool)
        # Until the first is there, only one more is read: who looks at one batch gets it sooner, and
        # two batches' memory is touched. Readers are asked for all of them: they take long.
        under_way = most if self._readers or isinstance(self._turns, Ring) else min(most, 2)
        pending = self._pending
        self._busy = True
        try:
            while True:
                # In a ring the slot that the caller held is free now: all of them may be pending.
                while len(pending) < under_way:
                    rows = next(incoming, None)
                    if rows is None:
                        break
                    # Known before it begins: whatever comes between finds it, to give it up.
                    pending.append(Job(self._turns.next(), np.asarray(rows, dtype=np.int64)))
                    self._start(pending[-1])
                if not pending:
                    return
                pending[0].wait(self._name_stalled)
                under_way = most
                yield self._hand_out(pending.popleft())
        finally:
            abandon(pending)
            while pending:
                self._turns.give(pending.popleft().slot)
            self._busy = False

    def _start(self, job: Job) -> None:
        """In the caller's thread: ask the readers, put the pieces into the threads' queue."""
        n = job.rows.size
        total = n * sum(source.row_bytes for source in self.sources.values())
        count = max(1, min(self.threads, n, total // _PIECE_BYTES))
        try:
            if n > self.max_rows:
                raise ConfigError(
                    f"a batch of {n} rows; this Gatherer was made for {self.max_rows}"
                )
            job.order, job.left = self._ahead.order(job.rows), count
        except Exception as error:  # raised in place of this batch, after those before it
            job.fail("", error)
            return
        if n and self._readers:
            self._ask_readers(job)
        if job.failures:
            job.cancel()
            return
        cuts = [n * index // count for index in range(count + 1)]
        for lo, hi in pairwise(cuts):
            job.pieces.append(self._pool.submit(self._fill, job, lo, hi))

    def _ask_readers(self, job: Job) -> None:
        """Every one of them, so that all that have something against the rows say it."""
        asked = job.rows[job.order]
        for name, reader in self._readers.items():
            try:
                job.fetches[name] = Fetch(reader, asked)
            except Exception as error:
                job.fail(name, error)

    def _fill(self, job: Job, lo: int, hi: int) -> None:
        """In a thread: one piece of a batch; the last one to finish sends it to the device."""
        places = job.order[lo:hi]
        rows = job.rows[places]
        name = ""
        try:
            if job.slot.copied is not None:
                job.slot.copied.synchronize()
            for name, mapped in self._maps.items():
                job.reading = name
                copy_rows(mapped, rows, places, job.slot.targets[name])
            for name, fetch in job.fetches.items():  # last: they come while the others are copied
                job.reading = name
                copy_rows(fetch.block(), np.arange(lo, hi), places, job.slot.targets[name])
            name = ""
            if job.last():
                for fetch in job.fetches.values():
                    fetch.forget()
                if self._on_cuda:
                    job.uploaded = self._upload(job.slot, job.rows.size)
        except Exception as error:
            job.fail(name, error)
            raise

    def _upload(self, slot: Slot, n: int) -> dict[str, torch.Tensor]:
        """Start the copies on a stream of their own, so that they overlap the caller's kernels."""
        import torch

        moved = {}
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            for output in self.outputs:
                there = slot.tensors[output.name][:n].to(self.device, non_blocking=True)
                moved[output.name] = there.to(getattr(torch, output.final))
            slot.copied = torch.cuda.Event()
            slot.copied.record(self._stream)
        return moved

    def _hand_out(self, job: Job) -> dict[str, torch.Tensor]:
        import torch

        if job.failures:
            self._look_at_files(job)
        job.raise_error()
        n = job.rows.size
        if isinstance(self._turns, Pool):
            return self._turns.lend(job.slot, n)
        if job.slot.copied is None:
            return {name: whole[:n] for name, whole in job.slot.tensors.items()}
        compute = torch.cuda.current_stream(self.device)
        compute.wait_event(job.slot.copied)
        for tensor in job.uploaded.values():
            tensor.record_stream(compute)  # else the allocator could reuse it too early
        return job.uploaded

    def _name_stalled(self, waited_s: float) -> None:
        """What the batch waits for, unless that is a reader that says so itself."""
        for reader in self._readers.values():
            getattr(reader, "look", _nothing)()
        job = self._pending[0]
        source = self.sources.get(job.reading)
        if source is None or getattr(self._readers.get(job.reading), "names_itself", False):
            return
        of = f" of {path}" if (path := getattr(source, "path", "")) else ""
        self._say(
            f"{job.reading}: has waited {waited_s:.0f} s for {job.rows.size} rows{of}; its disk, or the "
            "network share that it is on, may hang"
        )

    def _look_at_files(self, job: Job) -> None:
        """Of a batch that failed: what those files have against its rows that were not read for it."""
        for name, mapped in self._maps.items():
            if name not in job.failures and job.rows.size:
                try:
                    mapped.check(job.rows)
                except RaypipeError as error:
                    job.fail(name, error)

    def _new_slot(self) -> Slot:
        return Slot(self.outputs, self.sources, self.max_rows, self._on_cuda)

    @property
    def _on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def close(self) -> None:
        """Stop the threads. Batches handed out stay readable; no new ones can be asked for."""
        abandon(self._pending)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.close()

    def __enter__(self) -> Gatherer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _nothing() -> None:
    """Where a reader looks after no others."""


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


_LINUX = hasattr(os, "sched_getaffinity")
