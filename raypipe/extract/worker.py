"""The extraction worker: holds one backbone, reads images ahead, writes behind.

An ordinary class (``runner.StepWorker``). Three things overlap: threads decode the next cell of
the batch grid, this thread runs the forward pass, and one thread writes and commits finished rows.
Memory is bounded by design: at most two decoded cells and two cells of features exist at a time.
"""

from __future__ import annotations

import gc
import logging
import os
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raypipe.backbone import BackboneSpec
from raypipe.backbone.model import Precision
from raypipe.backbone.model import load as load_backbone
from raypipe.errors import BadImage, InputError, MemoryBudgetExceeded
from raypipe.extract.plan import RangeItem
from raypipe.read import Undecodable, try_read_image
from raypipe.runner import Done
from raypipe.store import RowSource, ShardWriter, WriterTarget

logger = logging.getLogger(__name__)

Targets = Mapping[str, Mapping[str, WriterTarget]]
"""group key -> layer key -> where its rows go."""


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
    device_name: str


@dataclass(frozen=True)
class Extracted:
    """What became of one item: rows, unreadable images (name, reason), halved batches."""

    rows: int
    bad: tuple[tuple[str, str], ...]
    halved_to: int | None


@dataclass
class _Cell:
    """One decoded cell of the grid: pixels (n, H, W, 3) uint8."""

    lo: int
    pixels: np.ndarray
    sources: list[RowSource]
    names: list[str]


class ExtractWorker:
    """Computes ranges of rows; see the module."""

    def __init__(self, setup: WorkerSetup) -> None:
        if setup.torch_threads:
            torch.set_num_threads(setup.torch_threads)
        self._setup = setup
        self._backbone = load_backbone(
            setup.spec, weights=setup.weights, device=setup.device, precision=setup.precision
        )
        self._host_hw = self._backbone.spec.preprocess.host_size(*setup.image_hw)
        self._decoders = ThreadPoolExecutor(setup.decode_threads, "decode")
        self._sink = ThreadPoolExecutor(1, "write")
        self._ahead: tuple[tuple[str, int], Future[_Cell]] | None = None
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._writing: Future[None] | None = None
        self._committing: list[tuple[Any, Future[Extracted]]] = []
        self._batch = 0
        self._writer_id = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._targets: Targets = {}
        self._writers: dict[tuple[str, str], ShardWriter] = {}

    def describe(self) -> Described:
        """Weights digest, size, device."""
        device = self._setup.device
        name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
        return Described(self._backbone.weights_sha256, self._backbone.n_parameters, name)

    def open(self, shared: Targets) -> None:
        """Take the stores that rows go to; files are opened when first written."""
        self.close()
        self._targets = shared

    def step(self, item: RangeItem, upcoming: RangeItem | None) -> list[Done]:
        """Compute ``item``; report what became durable, which may be an earlier item."""
        cells = list(item.cells())
        bad: list[tuple[str, str]] = []
        halved: int | None = None
        for index, (lo, paths) in enumerate(cells):
            cell = self._take(item.group, lo, paths)
            if index + 1 < len(cells):
                self._read_ahead(item.group, *cells[index + 1])
            elif upcoming is not None:
                self._read_ahead(upcoming.group, *next(upcoming.cells()))
            features, used = self._forward(cell.pixels)
            bad += [
                (n, s.reason) for n, s in zip(cell.names, cell.sources, strict=True) if s.reason
            ]
            halved = used if used < item.grid and used < len(paths) else halved
            self._write_behind(item.group, cell, features, used, item.attempt)
            del cell, features
        self._commit_behind(item, Extracted(item.hi - item.lo, tuple(bad), halved))
        return self._collect(wait_for_all=False)

    def drain(self) -> list[Done]:
        """Wait until everything handed in is durable, and report it."""
        return self._collect(wait_for_all=True)

    def close(self) -> None:
        """Finish writing and close the files."""
        self._collect(wait_for_all=True)
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    # --- reading ahead -----------------------------------------------------------------------

    def _read_ahead(self, group: str, lo: int, paths: tuple[Path, ...]) -> None:
        self._ahead = ((group, lo), self._reader.submit(self._decode, lo, paths))

    def _take(self, group: str, lo: int, paths: tuple[Path, ...]) -> _Cell:
        """The cell that was read ahead, or, when another was, this one now."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == (group, lo):
            return ahead[1].result()
        if ahead is not None:
            ahead[1].cancel()
        return self._decode(lo, paths)

    def _decode(self, lo: int, paths: tuple[Path, ...]) -> _Cell:
        pixels = np.zeros((len(paths), *self._host_hw, 3), np.uint8)
        jobs = [self._decoders.submit(self._decode_one, p, pixels[i]) for i, p in enumerate(paths)]
        return _Cell(lo, pixels, [job.result() for job in jobs], [path.name for path in paths])

    def _decode_one(self, path: Path, out: np.ndarray) -> RowSource:
        """Decode and resize into ``out`` (H, W, 3); a bad image leaves it zero, with the reason."""
        image = try_read_image(path)
        if isinstance(image, Undecodable):
            return self._bad(path, image)
        preprocess = self._backbone.spec.preprocess
        if preprocess.resize is None and image.pixels.shape[:2] != self._setup.image_hw:
            got, want = image.pixels.shape[:2], self._setup.image_hw
            raise InputError(
                f"{path.name} has {got[0]}x{got[1]} pixels, the first image {want[0]}x{want[1]}; "
                f"{self._backbone.spec.name} does not resize: give --image-size, or sort them apart"
            )
        try:
            out[...] = preprocess.host(image.pixels)
        except BadImage as error:  # too narrow to be resized
            narrow = Undecodable(
                reason=str(error), digest=image.digest, size_bytes=image.size_bytes
            )
            return self._bad(path, narrow)
        return RowSource(digest=image.digest, size_bytes=image.size_bytes, reason=None)

    def _bad(self, path: Path, image: Undecodable) -> RowSource:
        if self._setup.fail_on_bad_image:
            raise BadImage(f"{path}: {image.reason}; mend or remove it, or --on-bad-image mark")
        return RowSource(digest=image.digest, size_bytes=image.size_bytes, reason=image.reason)

    # --- forward -----------------------------------------------------------------------------

    def _forward(self, pixels: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
        """Features by layer, (n, T, D) float32, and the batch they were computed with.

        Out of memory halves the batch for this cell and all later ones of this worker.
        """
        n_rows = len(pixels)
        while True:
            batch = min(self._batch or n_rows, n_rows)
            try:
                parts = [
                    self._forward_batch(pixels[i : i + batch]) for i in range(0, n_rows, batch)
                ]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if batch == 1:
                    raise MemoryBudgetExceeded(
                        f"out of memory with one image a batch ({str(error).splitlines()[0]}); "
                        "take a smaller --image-size or backbone, fewer --workers, or a larger device"
                    ) from error
                self._batch = (batch + 1) // 2
                logger.warning("out of memory at batch %d; going on with %d", batch, self._batch)
            else:
                return _join(parts), batch
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _forward_batch(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        tokens = self._backbone.forward(torch.from_numpy(pixels))
        return {layer: value.cpu().numpy() for layer, value in tokens.items()}

    # --- writing behind ----------------------------------------------------------------------

    def _write_behind(
        self, group: str, cell: _Cell, features: dict[str, np.ndarray], batch: int, attempt: int
    ) -> None:
        """Hand the rows to the writing thread; waits while the cell before is still being written."""
        if self._writing is not None:
            self._writing.result()
        halved = batch if batch < len(cell.sources) else None
        self._writing = self._sink.submit(self._write, group, cell, features, halved, attempt)

    def _write(
        self,
        group: str,
        cell: _Cell,
        features: dict[str, np.ndarray],
        halved: int | None,
        attempt: int,
    ) -> None:
        for layer in self._targets[group]:  # a layer whose store is sealed has no target
            self._writer(group, layer).write(
                cell.lo, features[layer], cell.sources, batch=halved, attempt=attempt
            )

    def _commit_behind(self, item: RangeItem, result: Extracted) -> None:
        self._committing.append((item.key, self._sink.submit(self._commit, item.group, result)))

    def _commit(self, group: str, result: Extracted) -> Extracted:
        for layer in self._targets[group]:
            self._writer(group, layer).commit()
        return result

    def _writer(self, group: str, layer: str) -> ShardWriter:
        key = (group, layer)
        if key not in self._writers:
            self._writers[key] = ShardWriter(self._targets[group][layer], self._writer_id)
        return self._writers[key]

    def _collect(self, *, wait_for_all: bool) -> list[Done]:
        """Items whose commit is on disk; at most one older item may still be under way."""
        if wait_for_all and self._writing is not None:
            self._writing.result()
            self._writing = None
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
    return "DefaultCPUAllocator: can't allocate memory" in text or "out of memory" in text.lower()


def _join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    if len(parts) == 1:
        return parts[0]
    return {layer: np.concatenate([part[layer] for part in parts]) for layer in parts[0]}
