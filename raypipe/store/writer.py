"""The worker's side: rows in, pwrite into the shard, commit records out.

Many writers, in any processes, write disjoint cells of one file. `ShardWriter.write` puts bytes
into the page cache; `ShardWriter.commit` makes them durable and only then says so in the writer's
own journal. Nothing counts before it is committed. Memory: fixed scratch, whatever the batch.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from raypipe.errors import ConfigError, Fenced, StoreError
from raypipe.store.durable import fsync_dir, pwrite_all
from raypipe.store.fence import Fence
from raypipe.store.journal import CommitRecord, RowSource, header_line
from raypipe.store.layout import FILE_DTYPES, CellGrid, array_bytes
from raypipe.store.narrow import CHUNK, Narrower, NarrowingError
from raypipe.store.space import explain_os_errors

_NAN_BITS = {"float32": 0x7FC00000, "float16": 0x7E00, "bfloat16": 0x7FC0}


@dataclass(frozen=True, kw_only=True)
class WriterTarget:
    """All that a writer needs to know; small, picklable, sent to the workers by the driver."""

    data: Path
    journal: Path
    fence: Path
    fingerprint: str
    epoch: int
    token: str
    rows: int
    row_shape: tuple[int, ...]
    dtype: str
    grid: int
    data_offset: int

    @property
    def cells(self) -> CellGrid:
        """The grid of cells."""
        return CellGrid(
            rows=self.rows,
            grid=self.grid,
            row_bytes=array_bytes(FILE_DTYPES[self.dtype], self.row_shape),
            data_offset=self.data_offset,
        )


class ShardWriter:
    """Writes whole cells of one shard and commits them; closed rows that were not committed count
    as never written.

    ``writer_id`` names one incarnation of a worker: a restarted actor takes a new one. Methods may
    be called from several threads, one at a time goes on.
    """

    def __init__(self, target: WriterTarget, writer_id: str) -> None:
        """Open the shard. Raises Fenced when the run that made ``target`` is over."""
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", writer_id):
            raise ConfigError(f"writer id {writer_id!r} is not 1 to 100 of A-Z a-z 0-9 . _ -")
        self.target = target
        self.writer_id = writer_id
        self._cells = target.cells
        self._narrower = None if target.dtype == "float32" else Narrower(target.dtype)
        bits = np.dtype(f"<u{FILE_DTYPES[target.dtype].itemsize}")
        self._nans = np.full(CHUNK, _NAN_BITS[target.dtype], bits)
        self._pending: dict[int, CommitRecord] = {}
        self._journal: tuple[int, int] | None = None  # descriptor, bytes that are whole
        self._broken = ""
        self._mutex = threading.Lock()
        try:
            self._fence = Fence(target.fence)
            self._data = os.open(target.data, os.O_WRONLY)
        except FileNotFoundError as error:
            raise Fenced(
                f"writer {writer_id}: {error.filename} is gone, the run that writes {target.data} "
                "was sealed or replaced; it must stop"
            ) from None

    def write(
        self,
        lo: int,
        rows: np.ndarray,
        sources: Sequence[RowSource],
        *,
        batch: int | None = None,
        attempt: int = 1,
    ) -> None:
        """Write ``rows`` (n, *row_shape) float32, whole cells from row ``lo`` on, not yet durable.

        sources: one a row; one with a reason marks its row invalid: the row is stored as NaN,
        whatever ``rows`` holds there. batch: rows a forward pass, when not the grid. attempt: from
        2 on when the cell was handed out before; sealing then checks it against the disk.

        Raises StoreError for rows that are no whole cells, not float32, not finite, or beyond what
        the narrower dtype holds; NoSpace when the disk is full; Fenced.
        """
        self._check(lo, rows, sources)
        with self._mutex, self._allowed(rows.shape[0] * self._cells.row_bytes):
            for start in range(0, len(rows), self._cells.grid):
                part = slice(start, start + self._cells.grid)
                self._pending.pop(lo + start, None)
                self._pending[lo + start] = self._write_cell(
                    lo + start, rows[part], tuple(sources[part]), batch, attempt
                )

    def commit(self) -> list[CommitRecord]:
        """Make all that was written durable, then record it; the records, in row order.

        Raises Fenced (nothing is recorded), NoSpace (may be called again once there is room).
        """
        with self._mutex:
            if not self._pending and not self._broken:
                return []
            records = [self._pending[lo] for lo in sorted(self._pending)]
            lines = b"".join(record.to_line() for record in records)
            with self._allowed(len(lines)):
                self._sync(self._data)
                self._append(lines)
            self._pending = {}
            return records

    def flush(self) -> None:
        """Put what was written on the disk and let its pages go, without a commit.

        Raises NoSpace, Fenced.
        """
        with self._mutex:
            if self._pending:
                rows = sum(record.hi - record.lo for record in self._pending.values())
                with self._allowed(rows * self._cells.row_bytes):
                    self._sync(self._data)
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(self._data, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the files, without a commit."""
        with self._mutex:
            self._broken = self._broken or "it is closed"
            self._fence.close()
            descriptors = [self._data, self._journal[0] if self._journal else -1]
            self._data, self._journal = -1, None
            for fd in descriptors:
                if fd >= 0:
                    os.close(fd)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check(self, lo: int, rows: np.ndarray, sources: Sequence[RowSource]) -> None:
        target, hi = self.target, lo + len(rows)
        if rows.dtype != np.float32 or rows.shape[1:] != target.row_shape:
            raise StoreError(
                f"rows are {rows.dtype} {rows.shape}, {target.data.name} takes float32 "
                f"(n, {', '.join(map(str, target.row_shape))}); was another layer sent?"
            )
        if len(sources) != len(rows):
            raise StoreError(f"{len(sources)} sources for {len(rows)} rows; give one a row")
        whole = hi == target.rows or hi % target.grid == 0
        if not (0 <= lo < hi <= target.rows and lo % target.grid == 0 and whole):
            raise StoreError(
                f"rows [{lo}, {hi}) are no whole cells of {target.grid} in {target.rows} rows; "
                "hand out the ranges that missing() gives"
            )

    @contextlib.contextmanager
    def _allowed(self, need_bytes: int) -> Iterator[None]:
        if self._broken:
            raise StoreError(
                f"writer {self.writer_id} of {self.target.data} cannot go on: {self._broken}; "
                "open a new writer and write its uncommitted rows again"
            )
        with (
            self._fence.passing(self.target.epoch, self.target.token, self.writer_id),
            explain_os_errors(self.target.data, need_bytes),
        ):
            yield

    def _write_cell(
        self,
        lo: int,
        rows: np.ndarray,
        sources: tuple[RowSource, ...],
        batch: int | None,
        attempt: int,
    ) -> CommitRecord:
        offset, _ = self._cells.extent(lo // self._cells.grid)
        hasher, worst = xxhash.xxh3_64(), NarrowingError()
        for chunk, error in self._encode(lo, rows, sources):
            data = chunk.view(np.uint8).data
            hasher.update(data)
            pwrite_all(self._data, data, offset)
            offset += data.nbytes
            worst = worst.merge(error)
        return CommitRecord(
            lo=lo,
            hi=lo + len(rows),
            checksum=hasher.hexdigest(),
            attempt=attempt,
            epoch=self.target.epoch,
            writer=self.writer_id,
            batch=self.target.grid if batch is None else batch,
            error=worst,
            sources=sources,
        )

    def _encode(
        self, lo: int, rows: np.ndarray, sources: tuple[RowSource, ...]
    ) -> Iterator[tuple[np.ndarray, NarrowingError]]:
        """The cell's bytes in order, as chunks of the file's dtype, each with its error."""
        if rows.flags.c_contiguous and all(source.reason is None for source in sources):
            yield from self._encode_values(lo, rows.reshape(-1))
            return
        for row, source in enumerate(sources):
            if source.reason is None:
                yield from self._encode_values(lo + row, rows[row].reshape(-1))
            else:
                for start in range(0, rows[row].size, CHUNK):
                    yield self._nans[: rows[row].size - start], NarrowingError()

    def _encode_values(
        self, lo: int, values: np.ndarray
    ) -> Iterator[tuple[np.ndarray, NarrowingError]]:
        for start in range(0, values.size, CHUNK):
            chunk = values[start : start + CHUNK]
            # max and min carry NaN and inf out without a temporary the size of the chunk.
            if not (np.isfinite(chunk.max()) and np.isfinite(chunk.min())):
                at = start + int(np.flatnonzero(~np.isfinite(chunk))[0])
                row = lo + at // math.prod(self.target.row_shape)
                raise StoreError(
                    f"row {row} holds {values[at]}: the model overflowed; extract with "
                    "--precision fp32 or bf16, or mark the row invalid"
                )
            yield (chunk, NarrowingError()) if self._narrower is None else self._narrower(chunk)

    def _sync(self, fd: int) -> None:
        try:
            os.fdatasync(fd)
        except OSError as error:
            # The kernel marks the lost pages clean: a second fdatasync would "succeed".
            self._broken = f"its data did not reach the disk ({error.strerror})"
            self._pending = {}
            raise

    def _append(self, lines: bytes) -> None:
        if self._journal is None:
            self._journal = self._new_journal()
        fd, whole = self._journal
        header = b""
        if whole == 0:
            header = header_line(self.target.fingerprint, self.target.epoch, self.writer_id)
        try:
            pwrite_all(fd, header + lines, whole)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, whole)
            raise
        self._sync(fd)
        if whole == 0:
            fsync_dir(self.target.journal)
        self._journal = fd, whole + len(header) + len(lines)

    def _new_journal(self) -> tuple[int, int]:
        """A file of our own: appending to one that a namesake left torn would lose a record."""
        for number in range(1, 10_000):
            again = "" if number == 1 else f"-{number}"
            name = f"{self.target.epoch:08d}-{self.writer_id}{again}.jsonl"
            with contextlib.suppress(FileExistsError):
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                return os.open(self.target.journal / name, flags, 0o666), 0
        raise StoreError(f"writer id {self.writer_id!r} was used 10,000 times; take a new one")
