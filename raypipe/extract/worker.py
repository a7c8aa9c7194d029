"""The extraction worker: holds one backbone, reads images ahead, writes behind.

An ordinary class (``runner.StepWorker``). Three things overlap: threads read the next cell of the
batch grid (``cells``), this thread runs the forward pass, and one thread writes and commits finished
rows.
Memory is bounded by design: at most two decoded cells and two cells of features exist at a time.
It is asked about before each forward pass (``memory.guard``); while it is short the passes shrink.
"""

from __future__ import annotations

import logging
import os
import platform
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raypipe.backbone import BackboneSpec
from raypipe.backbone.model import Precision
from raypipe.backbone.model import load as load_backbone
from raypipe.errors import InputError, MemoryBudgetExceeded
from raypipe.extract.cells import Cell, CellReader
from raypipe.extract.plan import LESS_MEMORY, RangeItem
from raypipe.memory.guard import current, note, relieve
from raypipe.memory.policy import Throttle
from raypipe.runner import Done
from raypipe.store import ShardWriter, WriterTarget

logger = logging.getLogger(__name__)

Targets = Mapping[str, Mapping[str, WriterTarget]]
"""group key -> layer key -> where its rows go."""


@dataclass(frozen=True)
class Shared:
    """What all workers of a run share: where rows go, and the weights that they must have."""

    targets: Targets
    weights_sha256: str


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """What a worker needs to load; call it to make one (it travels to the actor as it is).

    image_hw : size in pixels that every image must have when the backbone does not resize.
    """

    spec: BackboneSpec
    weights: str
    device: str
    precision: Precision
    torch_threads: int | None
    decode_threads: int
    fail_on_bad_image: bool
    image_hw: tuple[int, int]

    def __call__(self) -> ExtractWorker:
        return ExtractWorker(self)


@dataclass(frozen=True)
class Described:
    """What a loaded worker says of its backbone."""

    weights_sha256: str
    n_parameters: int
    device_type: str
    device_name: str


@dataclass(frozen=True)
class Extracted:
    """What became of one item: its rows, and the batch that memory forced, if it did."""

    rows: int
    halved_to: int | None


class ExtractWorker:
    """Computes ranges of rows; see the module."""

    def __init__(self, setup: WorkerSetup) -> None:
        if setup.torch_threads:
            torch.set_num_threads(setup.torch_threads)
        self._setup = setup
        self._backbone = load_backbone(
            setup.spec, weights=setup.weights, device=setup.device, precision=setup.precision
        )
        self._cells = CellReader(
            self._backbone.spec,
            setup.image_hw,
            threads=setup.decode_threads,
            fail_on_bad_image=setup.fail_on_bad_image,
        )
        self._sink = ThreadPoolExecutor(1, "write")
        self._writing: Future[None] | None = None
        self._committing: list[tuple[Any, Future[Extracted]]] = []
        self._throttle: Throttle | None = None
        self._writer_id = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._targets: Targets = {}
        self._open_group = ""
        self._writers: dict[str, ShardWriter] = {}

    def describe(self) -> Described:
        """Weights digest, size, device."""
        device = self._setup.device
        on_cuda = device.startswith("cuda")
        return Described(
            weights_sha256=self._backbone.weights_sha256,
            n_parameters=self._backbone.n_parameters,
            device_type="cuda" if on_cuda else "cpu",
            device_name=torch.cuda.get_device_name(device) if on_cuda else platform.processor(),
        )

    def open(self, shared: Shared) -> str:
        """Take the stores that rows go to; files are opened when first written.

        Returns this worker's writer id. Raises InputError when this machine has other weights, or
        does not see the output folder.
        """
        mine = self._backbone.weights_sha256
        if mine != shared.weights_sha256:
            raise InputError(
                f"{platform.node()} has other weights (sha256 {mine[:12]}…) than the rest of the run "
                f"({shared.weights_sha256[:12]}…); give every machine the same --weights FILE"
            )
        for target in (t for layers in shared.targets.values() for t in layers.values()):
            if not target.journal.parent.is_dir():
                raise InputError(
                    f"{platform.node()} does not see {target.journal.parent}; put --output-dir on a "
                    "disk that every machine mounts"
                )
        self._finish_writing()
        self._targets = shared.targets
        return self._writer_id

    def step(self, item: RangeItem, upcoming: RangeItem | None) -> list[Done]:
        """Compute ``item``; report what became durable, which may be an earlier item."""
        cells = list(item.cells())
        halved: int | None = None
        writes: list[Future[None]] = []
        for index, (lo, paths) in enumerate(cells):
            cell = self._cells.take(item.group, lo, paths)
            note(step=lo, phase="extract")
            if index + 1 < len(cells):
                self._cells.read_ahead(item.group, *cells[index + 1])
            elif upcoming is not None:
                self._cells.read_ahead(upcoming.group, *next(upcoming.cells()))
            features, used = self._forward(cell.pixels, item.batch_limit or item.grid)
            halved = used if used < item.grid and used < len(paths) else halved
            writes.append(self._write_behind(item, cell, features, used))
            del cell, features
        self._commit_behind(item, writes, Extracted(item.hi - item.lo, halved))
        return self._collect(wait_for_all=False)

    def drain(self) -> list[Done]:
        """Wait until everything handed in is durable, and report it."""
        return self._collect(wait_for_all=True)

    def close(self) -> None:
        """Finish writing, close the files, end the threads."""
        self._finish_writing()
        self._cells.close()
        self._sink.shutdown(wait=True, cancel_futures=True)

    def _finish_writing(self) -> None:
        self._collect(wait_for_all=True)
        self._close_writers()

    def _close_writers(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
        self._open_group = ""

    # --- forward -----------------------------------------------------------------------------

    def _forward(self, pixels: np.ndarray, most: int) -> tuple[dict[str, np.ndarray], int]:
        """Features by layer, (n, T, D) float32, and the smallest batch they were computed with.

        most : rows a forward pass may take. Out of memory halves the batch, for this cell and, as
        what was too much once is too much again, for all later ones of this worker.
        """
        if self._throttle is None or most < self._throttle.limit:
            self._throttle = Throttle(most)
        while True:
            try:
                return self._forward_cell(pixels, self._throttle)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                batch = min(self._throttle.limit, len(pixels))
                if batch == 1:
                    raise MemoryBudgetExceeded(
                        f"out of memory with one image a batch ({error}); {LESS_MEMORY}"
                    ) from error
                self._throttle = Throttle((batch + 1) // 2)
                logger.warning("out of memory at batch %d; next %d", batch, self._throttle.limit)
            relieve()

    def _forward_cell(
        self, pixels: np.ndarray, throttle: Throttle
    ) -> tuple[dict[str, np.ndarray], int]:
        """As ``_forward``, without a second try. Rows of several passes go to one array as they
        come: joined at the end they would be held twice, just when memory is short.
        """
        n_rows, lo, smallest = len(pixels), 0, len(pixels)
        cell: dict[str, np.ndarray] = {}
        while lo < n_rows:
            batch = min(self._next_batch(throttle, new_cell=lo == 0), n_rows)
            part, smallest = self._forward_batch(pixels[lo : lo + batch]), min(smallest, batch)
            if batch == n_rows:
                return part, batch
            for layer, rows in part.items():
                if layer not in cell:
                    cell[layer] = np.empty((n_rows, *rows.shape[1:]), rows.dtype)
                cell[layer][lo : lo + batch] = rows
            lo += batch
        return cell, smallest

    def _next_batch(self, throttle: Throttle, *, new_cell: bool) -> int:
        """Rows that the next forward pass may take: the budget's boundary, asked at every one.

        Raises MemoryBudgetExceeded when the guard does.
        """
        before = throttle.limit
        pressed = current().pressure()
        batch = throttle.next(pressed)
        if batch < before:
            logger.warning("memory is short: batch %d from here on, it was %d", batch, before)
        if pressed and (new_cell or batch < before):  # at each tiny pass it would cost the most
            if self._writing is not None:
                wait([self._writing])  # the features of the cell before go first
            self._sink.submit(self._flush).result()
            relieve()
        note(batch=batch)
        return batch

    def _forward_batch(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        tokens = self._backbone.forward(torch.from_numpy(pixels))
        return {layer: value.cpu().numpy() for layer, value in tokens.items()}

    # --- writing behind ----------------------------------------------------------------------

    def _write_behind(
        self, item: RangeItem, cell: Cell, features: dict[str, np.ndarray], batch: int
    ) -> Future[None]:
        """Hand the rows to the writing thread; waits while the cell before is being written."""
        if self._writing is not None:
            wait([self._writing])
        halved = batch if batch < len(cell.sources) else None
        self._writing = self._sink.submit(self._write, item, cell, features, halved)
        return self._writing

    def _write(
        self, item: RangeItem, cell: Cell, features: dict[str, np.ndarray], halved: int | None
    ) -> None:
        if item.group != self._open_group:  # what was written of the group before is committed
            self._close_writers()
            self._open_group = item.group
        for layer in self._targets[item.group]:  # a layer whose store is sealed has no target
            self._writer(layer).write(
                cell.lo, features[layer], cell.sources, batch=halved, attempt=item.attempt
            )

    def _flush(self) -> None:
        """What was written goes to the disk now: the node has those pages again for the asking."""
        for writer in self._writers.values():
            writer.flush()

    def _commit_behind(
        self, item: RangeItem, writes: list[Future[None]], result: Extracted
    ) -> None:
        job = self._sink.submit(self._commit, item.group, writes, result)
        self._committing.append((item.key, job))

    def _commit(self, group: str, writes: list[Future[None]], result: Extracted) -> Extracted:
        for write in writes:
            write.result()  # a failed write raises here: nothing of this item is committed
        for layer in self._targets[group]:
            self._writer(layer).commit()
        return result

    def _writer(self, layer: str) -> ShardWriter:
        if layer not in self._writers:
            target = self._targets[self._open_group][layer]
            self._writers[layer] = ShardWriter(target, self._writer_id)
        return self._writers[layer]

    def _collect(self, *, wait_for_all: bool) -> list[Done]:
        """Items whose commit is on disk; at most one older item may still be under way."""
        done = []
        while self._committing:
            key, job = self._committing[0]
            if not (wait_for_all or len(self._committing) > 1 or job.done()):
                break
            done.append(Done(key, job.result()))
            self._committing.pop(0)
        return done


def is_out_of_memory(error: BaseException) -> bool:
    """True for CUDA's and the CPU allocator's out-of-memory errors."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return any(sign in text for sign in _OUT_OF_MEMORY_SIGNS) or "out of memory" in text.lower()


_OUT_OF_MEMORY_SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Unable to find a valid cuDNN algorithm",  # its workspace did not fit
)
