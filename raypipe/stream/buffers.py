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
from raypipe.stream.reading import Source

if TYPE_CHECKING:
    import torch


class Slot:
    """One batch's host buffers: ``tensors`` by name, (max_rows, *row_shape); pinned for CUDA."""

    def __init__(
        self,
        outputs: Sequence[Output],
        sources: Mapping[str, Source],
        max_rows: int,
        pinned: bool,
    ) -> None:
        import torch

        self.tensors: dict[str, torch.Tensor] = {}
        self.targets: dict[str, Target] = {}
        # The tensors' memory, and the dtype to see it as where numpy has none (bfloat16).
        self._arrays: dict[str, tuple[np.ndarray, torch.dtype | None]] = {}
        self.copied: torch.cuda.Event | None = None  # when the device copy out of it has finished
        self.lent = 0  # views of it that are somewhere out there
        for output in outputs:
            size = itemsize(output.host)
            memory = torch.empty(max_rows * output.row_bytes, dtype=torch.uint8, pin_memory=pinned)
            flat = memory.view(getattr(torch, output.host))
            tensor = self.tensors[output.name] = flat.view(max_rows, *output.row_shape)
            unknown = output.host == "bfloat16"
            known = tensor.view(torch.uint16) if unknown else tensor
            self._arrays[output.name] = known.numpy(), torch.bfloat16 if unknown else None
            raw = memory.numpy().reshape(max_rows, output.lines, -1)
            wide = flat.view(max_rows, output.lines, output.columns)
            for part in output.parts:
                end = part.first + part.columns
                self.targets[part.source] = Target(
                    raw[:, :, part.first * size : end * size],
                    wide[:, :, part.first : end],
                    sources[part.source].dtype != output.host,
                )

    def views(self, n: int) -> dict[str, tuple[np.ndarray, torch.Tensor]]:
        """The first ``n`` rows once more, each on a numpy view of its own that it keeps alive."""
        import torch

        fresh = {}
        for name, (array, dtype) in self._arrays.items():
            # Cut in numpy: every call of torch lets go of the GIL and waits for it again.
            view = array[:n]
            tensor = torch.from_numpy(view)
            fresh[name] = view, tensor if dtype is None else tensor.view(dtype)
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

    def lend(self, slot: Slot, n: int) -> dict[str, torch.Tensor]:
        """The slot's first ``n`` rows; it comes back when nothing refers to any of them any more."""
        lent = {}
        for name, (view, tensor) in slot.views(n).items():
            weakref.finalize(view, self._returned.append, slot).atexit = False
            lent[name] = tensor
        slot.lent = len(lent)
        return lent

    def give(self, slot: Slot) -> None:
        """Take back a slot that nobody refers to."""
        if len(self._free) < self._keep:
            self._free.append(slot)
