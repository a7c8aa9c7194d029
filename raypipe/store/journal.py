"""Commit records and the journals that hold them: JSON lines, each with the crc of itself.

A record says that the bytes of one cell are on the disk: it is appended after their fdatasync. A
journal belongs to one writer, so appends never mix. Reading keeps every whole record and drops
torn or damaged lines. Which records are believed is decided in `commits`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raypipe.errors import ConfigError
from raypipe.store.narrow import NarrowingError

_CRC_TAIL = len(',"crc":"00000000"}')
MAX_DIGEST = 64


@dataclass(frozen=True)
class RowSource:
    """Where one row came from: the file's digest (hex) and size; a reason marks it invalid."""

    digest: str
    size_bytes: int
    reason: str | None = None

    def __post_init__(self) -> None:
        if len(self.digest) > MAX_DIGEST or not self.digest.isascii():
            raise ConfigError(f"digest {self.digest!r} is not up to {MAX_DIGEST} hex characters")
        if self.size_bytes < 0:
            raise ConfigError(f"source size {self.size_bytes} is negative")


@dataclass(frozen=True)
class CommitRecord:
    """Rows [lo, hi), one cell, are on the disk with this checksum (xxh3_64 of the bytes, hex).

    batch: rows a forward pass, other than the grid when it was halved for lack of memory.
    """

    lo: int
    hi: int
    checksum: str
    attempt: int
    epoch: int
    writer: str
    batch: int
    error: NarrowingError
    sources: tuple[RowSource, ...] = field(repr=False)

    @property
    def max_rel_error(self) -> float:
        """Largest relative error of narrowing in this cell."""
        return self.error.relative

    def to_line(self) -> bytes:
        """The record as a line of a journal, crc and newline included."""
        error = self.error
        return seal_line(
            {
                "lo": self.lo,
                "hi": self.hi,
                "xxh3": self.checksum,
                "attempt": self.attempt,
                "epoch": self.epoch,
                "writer": self.writer,
                "batch": self.batch,
                "error": [error.relative, error.relative_normal, error.absolute],
                "sources": [_pack_source(source) for source in self.sources],
            }
        )

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> CommitRecord:
        """The record of a line's fields; KeyError, TypeError or ValueError for anything else."""
        relative, normal, absolute = map(float, fields["error"])
        return cls(
            lo=int(fields["lo"]),
            hi=int(fields["hi"]),
            checksum=f"{int(fields['xxh3'], 16):016x}",
            attempt=int(fields["attempt"]),
            epoch=int(fields["epoch"]),
            writer=str(fields["writer"]),
            batch=int(fields["batch"]),
            error=NarrowingError(relative, normal, absolute),
            sources=tuple(RowSource(*source) for source in fields["sources"]),
        )


def _pack_source(source: RowSource) -> list[Any]:
    packed: list[Any] = [source.digest, source.size_bytes]
    return packed if source.reason is None else [*packed, source.reason]


@dataclass(frozen=True)
class Line:
    """One whole line of a journal: its fields and where it lies in the file."""

    fields: dict[str, Any]
    offset: int
    raw: bytes = field(repr=False)


@dataclass
class JournalCount:
    """What reading met: whole records, torn tails, damaged lines, journals of another store."""

    records: int = 0
    torn: int = 0
    damaged: int = 0
    foreign: int = 0


def header_line(fingerprint: str, epoch: int, writer: str) -> bytes:
    """First line of a journal: whose it is."""
    return seal_line({"fingerprint": fingerprint, "epoch": epoch, "writer": writer})


def seal_line(fields: dict[str, Any]) -> bytes:
    """``fields`` as one JSON line that ends with the crc32 of what stands before it."""
    body = json.dumps(fields, separators=(",", ":"), allow_nan=False).encode()
    return body[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(body)


def open_line(raw: bytes) -> dict[str, Any] | None:
    """Fields of a whole line (with or without its newline), None when torn or damaged."""
    line = raw.removesuffix(b"\n")
    body, tail = line[:-_CRC_TAIL] + b"}", line[-_CRC_TAIL:]
    if tail != b',"crc":"%08x"}' % zlib.crc32(body):
        return None
    try:
        fields = json.loads(body)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None


def read_journal(path: Path, fingerprint: str, count: JournalCount) -> Iterator[Line]:
    """Whole record lines of one journal, in order, at one line's memory.

    A journal whose first line is torn, or names another fingerprint, gives none. A line that is
    damaged in the middle does not hide those after it. ``count`` is told what was met.
    """
    offset = 0
    with path.open("rb") as file:
        for raw in file:
            fields = open_line(raw)
            if fields is None:
                whole = raw.endswith(b"\n")
                count.damaged += whole
                count.torn += not whole
                if offset == 0:
                    return
            elif offset == 0:
                if fields.get("fingerprint") != fingerprint:
                    count.foreign += 1
                    return
            else:
                count.records += 1
                yield Line(fields, offset, raw)
            offset += len(raw)
