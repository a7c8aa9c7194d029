"""Host memory of batches: a slot a batch, used again and again, since fresh pages cost a fault each.

A `Slot` is reused in turn by a ring, or lent: then each tensor stands on a view of its own, which
lives as long as anything refers to its memory (the tensor, a slice of it, its ``.numpy()``, the
autograd graph), and the slot comes back when the last of its views is gone.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from raypipe.stream.copy import Target
from raypipe.stream.layout import Output, itemsize
from raypipe.stream.source import ArraySource

if TYPE_CHECKING:
    import torch


class Slot:
    """One batch's host buffers: ``tensors`` by name, (max_rows, *row_shape); pinned for CUDA."""

    def __init__(
        self,
        outputs: Sequence[Output],
        sources: Mapping[str, ArraySource],
        max_rows: int,
        pinned: bool,
    ) -> None:
        import torch

        self.tensors: dict[str, torch.Tensor] = {}
        self.targets: dict[str, Target] = {}
        self._memory: dict[str, np.ndarray] = {}  # (max_rows * row_bytes,) uint8 each
        self.copied: torch.cuda.Event | None = None  # when the device copy out of it has finished
        self.lent = 0  # views of it that are somewhere out there
        for output in outputs:
            size = itemsize(output.host)
            memory = torch.empty(max_rows * output.row_bytes, dtype=torch.uint8, pin_memory=pinned)
            flat = memory.view(getattr(torch, output.host))
            self.tensors[output.name] = flat.view(max_rows, *output.row_shape)
            self._memory[output.name] = memory.numpy()
            raw = self._memory[output.name].reshape(max_rows, output.lines, -1)
            wide = flat.view(max_rows, output.lines, output.columns)
            for part in output.parts:
                end = part.first + part.columns
                self.targets[part.source] = Target(
                    raw[:, :, part.first * size : end * size],
                    wide[:, :, part.first : end],
                    sources[part.source].dtype != output.host,
                )

    def views(self) -> dict[str, tuple[np.ndarray, torch.Tensor]]:
        """The tensors once more, each on a numpy view that its storage keeps alive, and no other's."""
        import torch

        fresh = {}
        for name, tensor in self.tensors.items():
            view = self._memory[name].view()
            fresh[name] = view, torch.from_numpy(view).view(tensor.dtype).view(tensor.shape)
        return fresh


class Ring:
    """``depth`` slots in turn: what is in one is valid until ``depth`` more were asked for."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = list(slots)
        self._turn = 0

    def next(self) -> Slot:
        """The slot whose turn it is."""
        self._turn += 1
        return self.slots[(self._turn - 1) % len(self.slots)]

    def give(self, slot: Slot) -> None:
        """Its turn comes again anyway."""


class Pool:
    """Slots that nobody refers to any more, newest first; ``make`` gives another when none is free.

    At most ``keep`` free ones are kept: what a user held and let go beyond that is freed.
    """

    def __init__(self, slots: Sequence[Slot], make: Callable[[], Slot]) -> None:
        self._free = list(slots)
        self._keep = len(self._free)
        self._make = make
        # One entry a view that is gone. A deque may be appended to from any thread, and in the
        # middle of a garbage collection.
        self._returned: deque[Slot] = deque()

    def next(self) -> Slot:
        """A slot that nothing refers to."""
        while self._returned:
            slot = self._returned.popleft()
            slot.lent -= 1
            if slot.lent == 0:
                self.give(slot)
        return self._free.pop() if self._free else self._make()

    def lend(self, slot: Slot) -> dict[str, torch.Tensor]:
        """The slot's tensors; it comes back when nothing refers to any of them any more."""
        lent = {}
        for name, (view, tensor) in slot.views().items():
            weakref.finalize(view, self._returned.append, slot).atexit = False
            lent[name] = tensor
        slot.lent = len(lent)
        return lent

    def give(self, slot: Slot) -> None:
        """Take back a slot that nobody refers to."""
        if len(self._free) < self._keep:
            self._free.append(slot)
