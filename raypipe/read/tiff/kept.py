"""Decoded strips, tiles and pictures that were needed in part only: kept for the next crop.

Tiles of a striped image meet the same strips again and again; without this each would be
decompressed once a tile. One for the process, bounded: at most `KEEP_BYTES`, and no more than one
page of the stack being read, so that reading a stack holds less than two of its pages. Whole
pictures have one of their own, else a stack's page would drive out the mask that goes with it. Both
are given back when memory is short.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Hashable

import numpy as np

from raypipe.memory.guard import on_relief

#: Of an image 32,768 pixels wide, 1,000 rows of 16 bits: a row of tiles with its halo.
KEEP_BYTES = 64 << 20


class Kept:
    """Arrays by key, the latest used last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrays: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._bytes = 0
        on_relief(self)

    def get(self, key: Hashable) -> np.ndarray | None:
        """The array of ``key``, not to be written to."""
        with self._lock:
            found = self._arrays.get(key)
            if found is not None:
                self._arrays.move_to_end(key)
            return found

    def make_room(self, n_bytes: int, limit_bytes: int) -> None:
        """Drop what has to go for ``n_bytes`` more: before they are allocated, not after."""
        with self._lock:
            self._shrink(n_bytes, limit_bytes)

    def put(self, key: Hashable, array: np.ndarray, limit_bytes: int) -> None:
        """Keep ``array`` if it fits into ``limit_bytes`` (`KEEP_BYTES` at most), instead of others."""
        with self._lock:
            self._drop(key)
            if self._shrink(array.nbytes, limit_bytes):
                self._arrays[key] = array
                self._bytes += array.nbytes

    def give_back(self) -> None:
        """Hold nothing."""
        with self._lock:
            self._arrays.clear()
            self._bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes held now."""
        return self._bytes

    def after_fork(self) -> None:
        """Another thread may have held the lock when this process was forked off."""
        self._lock = threading.Lock()
        self.give_back()

    def _shrink(self, n_bytes: int, limit_bytes: int) -> bool:
        limit = min(limit_bytes, KEEP_BYTES)
        while self._arrays and self._bytes + n_bytes > limit:
            self._drop(next(iter(self._arrays)))
        return self._bytes + n_bytes <= limit

    def _drop(self, key: Hashable) -> None:
        gone = self._arrays.pop(key, None)
        if gone is not None:
            self._bytes -= gone.nbytes


kept = Kept()
kept_pictures = Kept()
for _one in (kept, kept_pictures):
    os.register_at_fork(after_in_child=_one.after_fork)
