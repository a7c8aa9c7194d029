"""What the journals add up to: per cell, is it committed, and with which checksum.

Arrays of N/grid entries, not objects: a million records take some tens of MB. Knows nothing of
locks or sealing; `run` decides what to do with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from raypipe.errors import StoreCorrupt
from raypipe.store.journal import (
    MAX_DIGEST,
    CommitRecord,
    JournalCount,
    Line,
    open_line,
    read_journal,
)
from raypipe.store.layout import CellGrid
from raypipe.store.narrow import NarrowingError


class Claim(NamedTuple):
    """What one record says of its cell, and where its line lies (file -1: in no journal)."""

    checksum: int
    batch: int
    attempt: int
    error: tuple[float, float, float]
    place: tuple[int, int, int] = (-1, 0, 0)  # file, offset, length


class Commits:
    """Committed cells of one shard.

    done : (cells,) bool, checksum : (cells,) uint64, batch : (cells,) int64, error : (cells, 3)
    float64 (relative, relative in the normal range, absolute).
    """

    def __init__(self, grid: CellGrid) -> None:
        cells = len(grid)
        self.grid = grid
        self.count = JournalCount()
        self.done = np.zeros(cells, bool)
        self.checksum = np.zeros(cells, np.uint64)
        self.batch = np.zeros(cells, np.int64)
        self.retried = np.zeros(cells, bool)
        self.error = np.zeros((cells, 3))
        self.files: list[Path] = []
        self._place = np.zeros((cells, 3), np.int64)  # file, offset, length
        self._rivals: dict[int, list[Claim]] = {}

    @classmethod
    def read(cls, grid: CellGrid, journals: Sequence[Path], fingerprint: str) -> Commits:
        """All whole records of ``journals`` that fit the grid."""
        commits = cls(grid)
        commits.files = list(journals)
        for number, path in enumerate(journals):
            for line in read_journal(path, fingerprint, commits.count):
                commits._add_line(number, line)
        return commits

    def _add_line(self, file: int, line: Line) -> None:
        # Not CommitRecord.from_fields: its thousands of sources are not looked at here, and
        # building them would take most of the time of reading.
        fields = line.fields
        try:
            relative, normal, absolute = map(float, fields["error"])
            claim = Claim(
                int(fields["xxh3"], 16),
                int(fields["batch"]),
                int(fields["attempt"]),
                (relative, normal, absolute),
                (file, line.offset, len(line.raw)),
            )
            self._add(fields["lo"], fields["hi"], len(fields["sources"]), claim)
        except (KeyError, TypeError, ValueError):
            self.count.damaged += 1

    def add(self, record: CommitRecord) -> None:
        """Take in one record; one that is no cell of this grid is counted as damaged.

        Two records of one cell with other checksums (a halved batch, done again by another
        worker) are rivals: the first stands until `resolve` has seen the disk.
        """
        error = record.error
        claim = Claim(
            int(record.checksum, 16),
            record.batch,
            record.attempt,
            (error.relative, error.relative_normal, error.absolute),
        )
        self._add(record.lo, record.hi, len(record.sources), claim)

    def _add(self, lo: int, hi: int, n_sources: int, claim: Claim) -> None:
        cell = self.grid.cell_at(lo, hi)
        if cell is None or n_sources != hi - lo:
            self.count.damaged += 1
            return
        if claim.attempt > 1:
            self.retried[cell] = True
        if not self.done[cell]:
            self._set(cell, claim)
        elif claim.checksum != int(self.checksum[cell]):
            self._rivals.setdefault(cell, []).append(claim)

    def _set(self, cell: int, claim: Claim) -> None:
        self.done[cell] = True
        self.checksum[cell] = claim.checksum
        self.batch[cell] = claim.batch
        self.error[cell] = claim.error
        self._place[cell] = claim.place

    @property
    def disputed(self) -> list[int]:
        """Committed cells that more than one worker may have written: rivals and retries."""
        retried = np.flatnonzero(self.retried & self.done)
        return sorted({*self._rivals, *map(int, retried)})

    def resolve(self, cell: int, found: int | None) -> bool:
        """Hold ``cell`` against the checksum ``found`` on the disk: True if a record says it."""
        rivals = self._rivals.pop(cell, [])
        if found == int(self.checksum[cell]):
            return True
        for claim in rivals:
            if found == claim.checksum:
                self._set(cell, claim)
                return True
        self.done[cell] = False
        return False

    @property
    def rows_done(self) -> int:
        """Rows of committed cells."""
        rows = int(self.done.sum()) * self.grid.grid
        lo, hi = self.grid.range(len(self.grid) - 1)
        return rows - (self.grid.grid - (hi - lo)) * int(self.done[-1])

    def missing(self) -> list[tuple[int, int]]:
        """[lo, hi) of each cell that is not committed, in row order."""
        return [self.grid.range(int(cell)) for cell in np.flatnonzero(~self.done)]

    def halved(self) -> list[list[int]]:
        """[lo, hi, batch] of cells whose batch was not the grid's, neighbours joined."""
        found: list[list[int]] = []
        for cell in np.flatnonzero(self.done & (self.batch != self.grid.grid)):
            lo, hi = self.grid.range(int(cell))
            batch = int(self.batch[cell])
            if found and found[-1][1:] == [lo, batch]:
                found[-1][1] = hi
            else:
                found.append([lo, hi, batch])
        return found

    def worst_error(self) -> NarrowingError:
        """Largest narrowing errors over all committed cells."""
        done = self.error[self.done]
        return NarrowingError(*map(float, done.max(axis=0))) if len(done) else NarrowingError()

    def lines(self) -> Iterator[bytes]:
        """The standing records' lines as they were written, in row order."""
        handles = [path.open("rb") for path in self.files]
        try:
            for cell in np.flatnonzero(self.done):
                file, offset, length = map(int, self._place[cell])
                handles[file].seek(offset)
                line = handles[file].read(length)
                yield line if line.endswith(b"\n") else line + b"\n"
        finally:
            for handle in handles:
                handle.close()


@dataclass
class RowTable:
    """Per row: digest (N,) S64, size_bytes (N,) int64, and the reason of each invalid row."""

    digest: np.ndarray
    size_bytes: np.ndarray
    reasons: dict[int, str]

    @classmethod
    def of(cls, rows: int, lines: Iterable[bytes]) -> RowTable:
        """Gather the sources of record ``lines``, which must be whole."""
        table = cls(np.zeros(rows, f"S{MAX_DIGEST}"), np.zeros(rows, np.int64), {})
        for raw in lines:
            fields = open_line(raw)
            try:
                table._add(fields or {})
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise StoreCorrupt(
                    f"a journal line changed while it was read ({error!r}); run again"
                ) from None
        return table

    def _add(self, fields: dict[str, Any]) -> None:
        for row, (digest, size_bytes, *reason) in enumerate(fields["sources"], fields["lo"]):
            self.digest[row] = digest
            self.size_bytes[row] = size_bytes
            if reason:
                self.reasons[row] = reason[0]
