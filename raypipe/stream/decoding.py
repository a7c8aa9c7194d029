"""Rows that are made when they are asked for, by threads of this process.

A `Decoded` source names its rows and makes one at a time: `raypipe.stream.pixels.PixelSource` decodes
pictures, ``raypipe.segment.crops.CropSource`` cuts and augments crops. Opened, it is a `RowDecoder`; on
Ray the same handle travels to actors (``raypipe.cluster.decoders``).
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from raypipe.stream.reading import Source

# Beyond this one process's threads meet in Python more often than they help (PIL, NumPy and SciPy work
# without the GIL for most of a row); with Ray further actors take over.
MOST_THREADS = 8
# How soon a wait for a row on a disk that hangs hears that nobody wants it any more.
_LOOK_EVERY_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a job calls what its users can change, for messages.

    row : one of what is made. readers, data : options. smaller : how rows get smaller.
    """

    row: str
    readers: str
    data: str
    smaller: str


@runtime_checkable
class Decoded(Source, Protocol):
    """A source whose rows are made one at a time, the same in every process.

    readers : threads, or decode actors; None for as many as suit. path, terms : for messages.
    """

    @property
    def path(self) -> Path: ...
    @property
    def readers(self) -> int | None: ...
    @property
    def terms(self) -> Terms: ...

    def name_of(self, row: int) -> str:
        """What a person calls the row."""
        ...

    def check(self, rows: np.ndarray) -> None:
        """Raise ConfigError for a row that is not there."""
        ...

    def decode_row(self, row: int, out: np.ndarray) -> None:
        """Make ``row`` in ``out`` (*row_shape) of ``stored_dtype``; called by any thread."""
        ...

    def decode_rows(self, rows: np.ndarray) -> np.ndarray:
        """``rows`` (n,) as (n, *row_shape): `decode_rows` below."""
        ...


def decode_rows(source: Decoded, rows: np.ndarray) -> np.ndarray:
    """``rows`` (n,) one after the other, as (n, *row_shape); raises as the source's ``decode_row``."""
    made = np.empty((len(rows), *source.row_shape), source.stored_dtype)
    for place, row in enumerate(rows.tolist()):
        source.decode_row(row, made[place])
    return made


class RowDecoder:
    """`raypipe.stream.reading.RowReader` of a `Decoded` source, by threads of this process.

    A batch under way holds its own block of rows: of ``depth`` batches in a gatherer's ring, as
    many bytes again are held here until they are copied there.
    """

    def __init__(self, source: Decoded) -> None:
        self.source = source
        threads = source.readers or min(MOST_THREADS, _cores())
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="raypipe-decode")
        # What nobody waits for any more is not worth decoding.
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def check(self, rows: np.ndarray) -> None:
        """Raise ConfigError for rows that are not there."""
        self.source.check(rows)

    def start(self, rows: np.ndarray) -> Callable[[], np.ndarray]:
        """Begin to make ``rows``; the call waits, and gives (n, *row_shape)."""
        made = np.empty((len(rows), *self.source.row_shape), self.source.stored_dtype)
        jobs = [
            self._pool.submit(self.source.decode_row, row, made[place])
            for place, row in enumerate(rows.tolist())
        ]
        return _Decoding(self, jobs, made)


class _Decoding:
    """A batch being made: `raypipe.stream.reading.Cancellable`."""

    def __init__(self, reader: RowDecoder, jobs: list[Future[None]], made: np.ndarray) -> None:
        self._reader = reader  # who waits keeps its threads, whatever becomes of its owner
        self._jobs, self._made = jobs, made
        self._cancelled = False

    def __call__(self) -> np.ndarray:
        """Wait; the rows, or the first error."""
        for job in self._jobs:
            while not (job.done() or self._cancelled):
                wait([job], timeout=_LOOK_EVERY_S)
            if self._cancelled:
                raise CancelledError
            job.result()
        return self._made

    def cancel(self) -> None:
        """Rows that no thread has begun are left; the block is nobody else's."""
        self._cancelled = True
        for job in self._jobs:
            job.cancel()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
