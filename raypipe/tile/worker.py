"""The worker of tiled inference: holds the model and the source, reads ahead, computes, writes behind.

An ordinary class (``runner.StepWorker``). Three things overlap: a thread reads the next batch of
windows, this thread runs the model, and one thread writes finished tiles and commits them item by
item. Memory: two batches of windows, the model's own, and the tiles of two batches; when blending, the
block of tiles of one item. It is asked about before each batch (``memory.guard``), which then shrinks.
"""

from __future__ import annotations

import ctypes
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raypipe.errors import InputError, MemoryBudgetExceeded
from raypipe.memory.guard import current, note, relieve
from raypipe.memory.policy import Throttle
from raypipe.runner import Done
from raypipe.tile.blend import Blend, contribution, windows
from raypipe.tile.grid import Box, Tile, TileGrid
from raypipe.tile.ledger import TileTarget, TileWriter
from raypipe.tile.precision import exact_float32
from raypipe.tile.probe import dtype_of
from raypipe.tile.source import Source, read_window

_M_MMAP_THRESHOLD = -3
LESS_MEMORY = "take a smaller chunk_size, or a device with more memory"
Prepare = Callable[[np.ndarray], np.ndarray]
After = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class TileItem:
    """Tiles (numbers in one ``frame``'s grid) that are computed, committed and reported together."""

    frame: int
    tiles: tuple[int, ...]
    batch_limit: int

    @property
    def key(self) -> tuple[int, int]:
        return (self.frame, self.tiles[0])

    def again(self) -> TileItem:
        """The same tiles; writing one twice does no harm."""
        return self

    def with_less_memory(self) -> TileItem:
        """With half the batch. Raises MemoryBudgetExceeded at one window."""
        if self.batch_limit == 1:
            raise MemoryBudgetExceeded(
                f"a worker ran out of memory with one window at once (frame {self.frame}, tile "
                f"{self.tiles[0]}); {LESS_MEMORY}"
            )
        return replace(self, batch_limit=self.batch_limit // 2)

    def at_most(self, other: TileItem) -> TileItem:
        """With no larger a batch than ``other``."""
        return replace(self, batch_limit=min(self.batch_limit, other.batch_limit))


@dataclass(frozen=True, kw_only=True)
class TileSetup:
    """What a worker needs; call it to make one. after : pointwise, on the model's output (or on the
    blended one); prepare : pointwise, on a window (channels, *space) of the source's dtype.
    """

    model: nn.Module
    source: Source
    grid: TileGrid
    device: str
    torch_threads: int | None
    blend: Blend | None = None
    prepare: Prepare | None = None
    after: After | None = None

    def __call__(self) -> TileWorker:
        return TileWorker(self)


class TileWorker:
    """Computes items; see the module."""

    def __init__(self, setup: TileSetup) -> None:
        if setup.torch_threads:
            torch.set_num_threads(setup.torch_threads)
        if setup.device == "cpu":
            _keep_large_blocks_apart()
        self._setup, self._grid = setup, setup.grid
        self._device = torch.device(setup.device)
        self._model = setup.model.to(self._device)
        self._dtype = dtype_of(self._model)
        self._id = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._reader, self._sink = ThreadPoolExecutor(1, "read"), ThreadPoolExecutor(1, "write")
        self._ahead: tuple[Any, Future[np.ndarray]] | None = None
        self._writing: Future[None] | None = None
        self._committing: list[tuple[TileItem, Future[None]]] = []
        self._writer: TileWriter | None = None
        self._throttle: Throttle | None = None

    def describe(self) -> str:
        """Which process this is."""
        return self._id

    def open(self, target: TileTarget) -> str:
        """Take the result that tiles go to. Raises InputError where it is not seen."""
        if not target.journal.is_dir():
            raise InputError(
                f"{os.uname().nodename} does not see {target.journal}; put the output on a disk that "
                "every machine mounts"
            )
        self._close_writer()
        self._writer = TileWriter(target, self._id)
        return self._id

    def step(self, item: TileItem, upcoming: TileItem | None) -> list[Done]:
        """Compute ``item``; report what became durable, which may be an earlier item."""
        tiles = self._windows(item)
        block = _Block(self._grid, item, self._setup.blend) if self._setup.blend else None
        done = 0
        while done < len(tiles):
            part = tiles[done : done + self._next_batch(item)]
            pixels = self._take(item.frame, part)
            done += len(part)
            after = tiles[done : done + len(part)]
            if after:
                self._read_ahead(item.frame, after)
            elif upcoming is not None:
                self._read_ahead(upcoming.frame, self._windows(upcoming)[: len(part)])
            for window, out in zip(part, self._forward(pixels), strict=True):
                if block is not None:
                    block.add(window, out)
                else:
                    self._put(item, [(window, out[(slice(None), *window.inner)])])
        if block is not None:
            self._put(item, block.tiles(self._setup.after))
        self._committing.append((item, self._sink.submit(self._commit, self._writing)))
        return self._collect(wait_for_all=False)

    def drain(self) -> list[Done]:
        """Wait until everything is durable, and report it."""
        return self._collect(wait_for_all=True)

    def close(self) -> None:
        """Close the files, end the threads."""
        self._close_writer()
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._sink.shutdown(wait=True, cancel_futures=True)

    def _close_writer(self) -> None:
        if self._writer is not None:
            wait([job for _, job in self._committing])
            if self._writing is not None:
                wait([self._writing])
            self._committing.clear()
            self._writer.close()
        self._writer = None

    def _windows(self, item: TileItem) -> list[Tile]:
        tiles = [self._grid.tile(number) for number in item.tiles]
        if self._setup.blend is None:
            return tiles
        return list(windows(self._grid, [tile.place for tile in tiles]))

    # --- reading -----------------------------------------------------------------------------

    def _read(self, frame: int, tiles: Sequence[Tile]) -> np.ndarray:
        """(n, channels, *window) float32, of a float64 model float64."""
        source, prepare = self._setup.source, self._setup.prepare
        batch: np.ndarray | None = None
        for index, tile in enumerate(tiles):
            pixels = read_window(source, frame, tile.read)
            if prepare is not None:
                pixels = prepare(pixels.copy())  # it may be a view of the caller's image
            if batch is None:
                wide = np.float64 if self._dtype == torch.float64 else np.float32
                batch = np.empty((len(tiles), *pixels.shape), wide)
            batch[index] = pixels
        assert batch is not None
        return batch

    def _take(self, frame: int, tiles: Sequence[Tile]) -> np.ndarray:
        """What was read ahead, where it is what is wanted."""
        key, ahead = (frame, [tile.number for tile in tiles]), self._ahead
        self._ahead = None
        if ahead is not None and ahead[0] == key:
            return ahead[1].result()
        if ahead is not None:
            wait([ahead[1]])
        return self._read(frame, tiles)

    def _read_ahead(self, frame: int, tiles: Sequence[Tile]) -> None:
        key = (frame, [tile.number for tile in tiles])
        self._ahead = key, self._reader.submit(self._read, frame, tiles)

    # --- computing ---------------------------------------------------------------------------

    def _next_batch(self, item: TileItem) -> int:
        """Windows to compute at once. Raises MemoryBudgetExceeded when the guard does."""
        if self._throttle is None or item.batch_limit < self._throttle.limit:
            self._throttle = Throttle(item.batch_limit)
        if pressed := current().pressure():
            relieve()
        batch = self._throttle.next(pressed)
        note(step=item.tiles[0], batch=batch, phase="tiles")
        return batch

    def _forward(self, pixels: np.ndarray) -> Iterator[np.ndarray]:
        """The result of each window; fewer at once for good when the device runs out of memory."""
        assert self._throttle is not None
        done = 0
        while done < len(pixels):
            n = min(self._throttle.limit, len(pixels) - done)
            out = self._tried(pixels[done : done + n])
            if out is None:  # out of the except block: the error holds what was computed so far
                self._throttle = Throttle(n // 2)
                relieve()
                continue
            yield from out
            done += n

    def _tried(self, pixels: np.ndarray) -> np.ndarray | None:
        """None when the device runs out of memory. Raises MemoryBudgetExceeded for one window."""
        try:
            return self._compute(pixels)
        except torch.OutOfMemoryError as error:
            if len(pixels) == 1:
                raise MemoryBudgetExceeded(
                    f"out of memory with one window at once ({error}); {LESS_MEMORY}"
                ) from error
            return None

    def _compute(self, pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), exact_float32(self._device):
            out = self._model(torch.from_numpy(pixels).to(self._device, self._dtype))
            if self._setup.after is not None and self._setup.blend is None:
                out = self._setup.after(out)
            elif self._setup.blend is not None:
                out = out.float()  # weights and sums are; bfloat16 is no NumPy dtype
            return out.cpu().numpy()

    # --- writing behind ----------------------------------------------------------------------

    def _put(self, item: TileItem, tiles: Sequence[tuple[Tile, np.ndarray]]) -> None:
        """Hand tiles to the writing thread; waits while those before are being written."""
        if self._writing is not None:
            self._writing.result()
        first = item.frame * len(self._grid)
        numbered = [(first + tile.number, data) for tile, data in tiles]
        self._writing = self._sink.submit(self._write, numbered)

    def _write(self, tiles: Sequence[tuple[int, np.ndarray]]) -> None:
        assert self._writer is not None
        for number, data in tiles:
            self._writer.write(number, data)

    def _commit(self, last: Future[None] | None) -> None:
        assert self._writer is not None
        if last is not None:
            last.result()  # a failed write raises here: nothing of this item is committed
        self._writer.commit()

    def _collect(self, *, wait_for_all: bool) -> list[Done]:
        done = []
        while self._committing:
            item, job = self._committing[0]
            if not (wait_for_all or len(self._committing) > 1 or job.done()):
                break
            job.result()
            done.append(Done(item.key, item))
            self._committing.pop(0)
        return done


class _Block:
    """The blended result of an item's tiles."""

    def __init__(self, grid: TileGrid, item: TileItem, kind: Blend) -> None:
        self._grid, self._kind = grid, kind
        self._tiles = [grid.tile(number) for number in item.tiles]
        boxes = list(zip(*(tile.keep for tile in self._tiles), strict=True))
        self._region: Box = tuple(
            slice(min(s.start for s in spans), max(s.stop for s in spans)) for spans in boxes
        )
        self._sum: np.ndarray | None = None

    def add(self, window: Tile, out: np.ndarray) -> None:
        """out : (channels, *window)."""
        if self._sum is None:
            space = tuple(s.stop - s.start for s in self._region)
            self._sum = np.zeros((len(out), *space), np.float32)
        part = contribution(self._grid, window, self._region, self._kind)
        if part is not None:
            to, of, weight = part
            self._sum[(slice(None), *to)] += weight * out[(slice(None), *of)]

    def tiles(self, after: After | None) -> list[tuple[Tile, np.ndarray]]:
        """Each tile with its result."""
        assert self._sum is not None
        whole = self._sum
        if after is not None:
            with torch.inference_mode():
                whole = after(torch.from_numpy(whole)[None])[0].numpy()
        origin = [s.start for s in self._region]
        made = []
        for tile in self._tiles:
            box = [slice(s.start - o, s.stop - o) for s, o in zip(tile.keep, origin, strict=True)]
            made.append((tile, whole[(slice(None), *box)]))
        return made


def _keep_large_blocks_apart() -> None:
    """Have glibc map and unmap each block of 1 MiB or more, for the rest of the process.

    By default it comes to keep freed blocks of up to 32 MiB in its heaps, where those of three threads
    leave gaps: the peak grew by 7 to 9 % from an image of 2k to one of 8k pixels a side, so by 1 %.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if sys.platform == "linux" and mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)
