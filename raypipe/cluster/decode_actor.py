"""The process that decodes images for Train workers, with its lease: what becomes an actor.

Who makes such actors, hands rows to them and replaces them is `decoders`; the decoding itself is
`raypipe.stream.pixels`. It holds one part of a batch and one picture at a time, so its budget is
computed from these rather than taken from the run's: a decoder for every core must fit beside the
workers that train.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

import numpy as np

from raypipe.cluster.awaited import Spot, here
from raypipe.cluster.budget import Lease, helping
from raypipe.memory.guard import current, note, relieve
from raypipe.stream.decoding import Decoded

# Such a process held 0.1 GiB before its first picture; a lease's last 256 MiB cannot be used.
BASE_BYTES = 768 << 20
# A picture of 50 megapixels, twice as RGB and once more in floats for a resize in steps, is 0.4 GiB.
PICTURE_BYTES = 512 << 20
# The part that is made, and the one before it that is on its way into the object store.
PARTS = 2


def budget_bytes(source: Decoded, part_rows: int, most_bytes: int) -> int:
    """Bytes of an actor that decodes parts of ``part_rows`` rows; never above ``most_bytes``, the
    run's budget per process.
    """
    return min(most_bytes, BASE_BYTES + PICTURE_BYTES + PARTS * part_rows * source.row_bytes)


class DecodeActor:
    """Decodes rows of one source, under ``lease``; an ordinary class. None: nobody watches it."""

    def __init__(self, source: Decoded, lease: Lease | None) -> None:
        self._source, self._lease = source, lease
        self._held: ExitStack | None = None  # until the actor ends

    def where(self) -> Spot:
        """Asked first of all: who waits for it asks there what it waits for."""
        return here()

    def decode(self, rows: np.ndarray) -> np.ndarray:
        """(n, *row_shape); raises as the source's ``decode_row``, and MemoryBudgetExceeded
        (LeaseTimeout) when this process did not get its lease.
        """
        self.ready()
        made = self._source.decode_rows(rows)
        if current().pressure():
            relieve()
        return made

    def ready(self) -> int:
        """Take the lease, once; this process's number. Raises MemoryBudgetExceeded (LeaseTimeout)."""
        if self._held is None:  # here, not when it is made: this error reaches who asks
            self._held = self._watched()
        return os.getpid()

    def _watched(self) -> ExitStack:
        stack, lease = ExitStack(), self._lease
        if lease is not None:
            stack.enter_context(helping(lease.order, lease.label, lease.budget_bytes))
            note(phase="decode")
        return stack
