"""The seam between a `Gatherer` and wherever rows come from: a local file, another node, images.

A `Source` says what its rows are; opened, it is `MappedRows` (a file on this node, read in place) or
a `RowReader` (anything else: rows are asked for a batch at a time and waited for). Both end in
`Readable`, which is all that `raypipe.stream.copy` knows: a reader's rows as a `Fetched` block. How a
batch is waited for, and how that is ended early: `raypipe.stream.fetch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from raypipe.errors import StoreCorrupt

if TYPE_CHECKING:
    from raypipe.stream.mapped import MappedRows


class Source(Protocol):
    """What is read of a source of rows; `ArraySource` is the one that is a file.

    row_bytes: of one row in ``stored_dtype`` (bfloat16 is stored as uint16, ``dtype`` says so).
    fingerprint: names the content, "" where nobody knows it. It is picklable: it travels to
    workers.
    """

    @property
    def n_rows(self) -> int: ...
    @property
    def row_shape(self) -> tuple[int, ...]: ...
    @property
    def row_bytes(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def stored_dtype(self) -> np.dtype: ...
    @property
    def fingerprint(self) -> str: ...

    def open(self) -> MappedRows | RowReader:
        """Make the rows readable in this process."""
        ...


class RowReader(Protocol):
    """Rows of one source, however they come. All calls are made by one thread, but for the wait.

    Batches under way may number as many as the gatherer's ``depth``: what they hold on the way is
    the reader's to bound. The gatherer says of a source that its rows do not come; a reader that says so
    itself, within 30 s and better, has ``names_itself = True``; with a method ``look()`` also while
    another source of the batch is waited for, when that is called.
    """

    @property
    def source(self) -> Source: ...

    def check(self, rows: np.ndarray) -> None:
        """Raise ConfigError or StoreCorrupt unless ``rows`` (n,) int64, n > 0, can be asked for."""
        ...

    def start(self, rows: np.ndarray) -> Callable[[], np.ndarray]:
        """Begin to read ``rows`` (n,) int64, n > 0, without waiting.

        What is returned is called at most once, from another thread: it waits and gives
        (n, row_bytes) uint8, or a contiguous array of as many bytes, in the order of ``rows``. It
        is let go uncalled when the batch is not wanted any more.

        It should be a `Cancellable`. Any other callable will do: it is waited for in a daemon thread
        of its own, a batch, so that nobody else has to stay when the batch is dropped; but what it
        reads goes on being read until it comes to its own end.
        """
        ...


@runtime_checkable
class Cancellable(Protocol):
    """What `RowReader.start` should return: the wait for a batch, and a way to end it early."""

    def __call__(self) -> np.ndarray:
        """As `RowReader.start` says."""
        ...

    def cancel(self) -> None:
        """The batch is not wanted: let go of what was asked for, without waiting.

        Called by any thread before, during or after the call, perhaps twice. A call that is under
        way ends within about a second, one that comes later at once: both raise CancelledError (of
        concurrent.futures), or give the rows where they have come.
        """
        ...


OpenRows = Callable[["Source"], "MappedRows | RowReader"]
"""How a source is opened here and now; ``None`` in its place: `raypipe.stream.at_hand`."""


class Readable(Protocol):
    """Rows that can be copied out of now, by any thread."""

    @property
    def source(self) -> Source: ...

    def check(self, rows: np.ndarray) -> None:
        """Raise as `RowReader.check`, n > 0."""
        ...

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy ``rows`` (n,) to ``out`` (n, row_bytes) uint8, contiguous."""
        ...

    def part(self, row: int, first: int, out: np.ndarray) -> None:
        """Copy the bytes of one row from ``first`` on to ``out`` (bytes,) uint8, contiguous."""
        ...


class Fetched:
    """The rows of one batch that a reader brought: row i is the i-th of those asked for."""

    def __init__(self, source: Source, rows: int, found: np.ndarray) -> None:
        self.source = source
        if found.nbytes != rows * source.row_bytes:
            raise StoreCorrupt(
                f"a reader gave {found.nbytes} bytes for {rows} rows of {source.row_bytes}; what it "
                "reads is not what its source describes: extract or copy it again"
            )
        flat = np.ascontiguousarray(found).reshape(-1).view(np.uint8)
        self._bytes = flat.reshape(rows, source.row_bytes)

    def check(self, rows: np.ndarray) -> None:
        """Nothing: the reader has checked them."""

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """As `Readable.take`."""
        first, last = int(rows[0]), int(rows[-1])
        if last - first == rows.size - 1:  # a gatherer asks for neighbours, in their order
            out[:] = self._bytes[first : last + 1]
        else:
            np.take(self._bytes, rows, axis=0, out=out, mode="clip")

    def part(self, row: int, first: int, out: np.ndarray) -> None:
        """As `Readable.part`."""
        out[:] = self._bytes[row, first : first + out.size]
