"""Batches of rows, read one ahead: file maps -> reused host buffers -> (on CUDA) device tensors.

A background thread copies the next batch's rows while the caller computes on the present one. Row
arrays are pulled from the caller's iterator in the caller's own thread, at most ``depth - 1``
batches ahead, so the iterator needs no lock and its errors surface where they belong.

Which rows: `raypipe.stream.plan`. What a source is: `raypipe.stream.source`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from raypipe.errors import ConfigError
from raypipe.stream.source import ArraySource

if TYPE_CHECKING:
    import torch


@dataclass
class _Slot:
    """One batch's host buffers: the same memory as tensors and as bytes (max_rows, row_bytes)."""

    tensors: dict[str, torch.Tensor]
    raw: dict[str, np.ndarray]
    copied: torch.cuda.Event | None  # set when the device copy out of this slot has finished


def ring_bytes(sources: Mapping[str, ArraySource], max_rows: int, depth: int) -> int:
    """Host bytes of a `Gatherer` of these, before there is one."""
    return sum(source.row_bytes for source in sources.values()) * max_rows * depth


class Gatherer:
    """Reads batches from ``sources`` that share their row numbers (tokens, lh, rh, ...).

    ``max_rows``: rows of the largest batch. ``depth``: batches in the ring, >= 2: one in the
    caller's hands, the others being read. Host memory: `buffer_bytes`, pinned when ``device`` is
    CUDA. Close it, or use it in a ``with`` block. Raises as `ArraySource.open`, and ConfigError.
    """

    def __init__(
        self,
        sources: Mapping[str, ArraySource],
        max_rows: int,
        device: str | torch.device = "cpu",
        depth: int = 3,
    ) -> None:
        import torch

        if not sources or max_rows < 1 or depth < 2:
            raise ConfigError(
                f"gatherer of {len(sources)} sources, max_rows={max_rows}, depth={depth}: give at "
                "least one source, one row and a depth of 2"
            )
        self.sources = dict(sources)
        self.max_rows = max_rows
        self.device = torch.device(device)
        self._maps = {name: source.open() for name, source in self.sources.items()}
        self._slots = [self._new_slot() for _ in range(depth)]
        self._stream = torch.cuda.Stream(self.device) if self._on_cuda else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="raypipe-gather")
        self._busy = False

    @property
    def buffer_bytes(self) -> int:
        """Host bytes that the ring holds."""
        return ring_bytes(self.sources, self.max_rows, len(self._slots))

    def batches(
        self, row_arrays: Iterable[np.ndarray]
    ) -> Generator[dict[str, torch.Tensor], None, None]:
        """One dict of tensors (n, *row_shape) for each array of rows (n,), in order.

        On the CPU the tensors are views of the ring: valid until the next one is asked for. An
        error of reading is raised in place of the batch that it befell.
        """
        if self._busy:
            raise ConfigError("this Gatherer is already giving batches; open a second one")
        incoming = iter(row_arrays)
        pending: deque[tuple[_Slot, Future[dict[str, torch.Tensor]]]] = deque()
        turn = 0
        self._busy = True
        try:
            while True:
                # The caller is back: the slot it held is free, so all `depth` slots may be pending.
                while len(pending) < len(self._slots):
                    rows = next(incoming, None)
                    if rows is None:
                        break
                    slot = self._slots[turn % len(self._slots)]
                    pending.append((slot, self._thread.submit(self._fill, slot, rows)))
                    turn += 1
                if not pending:
                    return
                slot, future = pending.popleft()
                yield self._hand_out(slot, future.result())
        finally:
            wait([future for _, future in pending if not future.cancel()])
            self._busy = False

    def _fill(self, slot: _Slot, rows: np.ndarray) -> dict[str, torch.Tensor]:
        """In the thread: rows -> the slot's buffers -> the device."""
        n = len(rows)
        if n > self.max_rows:
            raise ConfigError(f"a batch of {n} rows; this Gatherer was made for {self.max_rows}")
        if slot.copied is not None:
            slot.copied.synchronize()
        for name, mapped in self._maps.items():
            mapped.take(rows, slot.raw[name][:n])
        batch = {name: tensor[:n] for name, tensor in slot.tensors.items()}
        return self._upload(slot, batch) if self._on_cuda else batch

    def _upload(self, slot: _Slot, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Start the copies on a stream of their own, so that they overlap the caller's kernels."""
        import torch

        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            moved = {name: host.to(self.device, non_blocking=True) for name, host in batch.items()}
            slot.copied = torch.cuda.Event()
            slot.copied.record(self._stream)
        return moved

    def _hand_out(self, slot: _Slot, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        if slot.copied is not None:
            compute = torch.cuda.current_stream(self.device)
            compute.wait_event(slot.copied)
            for tensor in batch.values():
                tensor.record_stream(compute)  # else the allocator could reuse it too early
        return batch

    def _new_slot(self) -> _Slot:
        import torch

        tensors, raw = {}, {}
        for name, source in self.sources.items():
            tensor = torch.empty(
                (self.max_rows, *source.row_shape),
                dtype=getattr(torch, source.dtype),
                pin_memory=self._on_cuda,
            )
            tensors[name] = tensor
            raw[name] = tensor.reshape(self.max_rows, -1).view(torch.uint8).numpy()
        return _Slot(tensors, raw, None)

    @property
    def _on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def close(self) -> None:
        """Stop the thread. Batches handed out stay readable; no new ones can be asked for."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Gatherer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
