"""Reading ahead of the gatherer: which pages to ask the kernel for, and in what order to touch them.

All of it is hints, for files that are not in the page cache; where they are, a look at a few rows
now and then is all that it costs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np

from raypipe.stream.mapped import MappedRows

# As long as batches are found in the page cache, ever fewer of them are looked at, down to this.
_RAREST_LOOK = 64


class Ahead:
    """Hints for the files in ``maps``, as `Gatherer`'s ``sort_reads`` and ``read_ahead`` say."""

    def __init__(
        self, maps: Iterable[MappedRows], sort_reads: bool | None, read_ahead: int | None
    ) -> None:
        self._maps = list(maps)
        self._sort, self._batches = sort_reads, read_ahead
        self._looks = sort_reads is None or read_ahead is None
        self._pause, self._since = 1, 0
        # A thread of its own: a slow disk's queue may be full, and asking then waits.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="raypipe-ahead")
        for mapped in self._maps:
            mapped.expect_jumps()

    def through(self, incoming: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """``incoming``; asks for ``read_ahead`` batches together, at least one such group ahead."""
        if not self._batches:
            yield from incoming
            return
        waiting: deque[np.ndarray] = deque()
        while True:
            while len(waiting) <= self._batches:
                group = list(islice(incoming, self._batches))
                if not group:
                    break
                rows = np.concatenate([np.asarray(rows, dtype=np.int64) for rows in group])
                self._thread.submit(self._ask, rows)
                waiting.extend(group)
            if not waiting:
                return
            yield waiting.popleft()

    def order(self, rows: np.ndarray) -> np.ndarray:
        """The places of ``rows`` in the order to read them; cold rows are asked for by the way."""
        cold = self._looks and self._cold(rows)
        if cold and self._batches is None:
            self._thread.submit(self._ask, rows)
        if self._sort or (cold and self._sort is None):
            return np.argsort(rows, kind="stable")
        return np.arange(rows.size)

    def _ask(self, rows: np.ndarray) -> None:
        for mapped in self._maps:
            if not mapped.resident(rows):
                mapped.ask_for(rows)

    def _cold(self, rows: np.ndarray) -> bool:
        self._since += 1
        if self._since < self._pause:
            return False
        self._since = 0
        cold = any(mapped.resident(rows) is False for mapped in self._maps)
        self._pause = 1 if cold else min(2 * self._pause, _RAREST_LOOK)
        return cold

    def close(self) -> None:
        """Stop asking."""
        self._thread.shutdown(wait=True, cancel_futures=True)
