"""Memory that comes from the kernel and goes back to it, whatever the heap of a long test run holds."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def taken(n_bytes: int) -> Iterator[None]:
    """Hold ``n_bytes`` of touched anonymous memory for the length of the block."""
    with mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        pages = np.frombuffer(held, np.uint8)
        pages.fill(1)
        try:
            yield
        finally:
            del pages
