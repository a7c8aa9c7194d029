"""A TIFF file's directories (IFDs), read by pread: no file position, so no lock between threads.

tifffile reads them too, as objects of some kilobytes each and through one file position. Here a
directory is what its few bytes say; which of it matters to whom is decided elsewhere. Classic and
BigTIFF, both byte orders. Raises InputError for what is not whole.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from raypipe.errors import InputError

STRIP_OFFSETS, STRIP_COUNTS = 273, 279
TILE_OFFSETS, TILE_COUNTS = 324, 325
JPEG_TABLES = 347
# What pages of one stack must have in common to share a decoder: size, depth and format of samples,
# compression, photometric, fill order, samples, rows a strip, planes, predictor, tiles, extra samples.
SAME = frozenset(
    (256, 257, 258, 259, 262, 266, 277, 278, 284, 317, 322, 323, 338, 339, 32997, 32998)
)
# What the pixels of a page, or how many pages there are, depend on: also the description.
PIXEL_TAGS = SAME | {270, STRIP_OFFSETS, STRIP_COUNTS, TILE_OFFSETS, TILE_COUNTS, 330, JPEG_TABLES}
# BYTE ASCII SHORT LONG RATIONAL SBYTE UNDEFINED SSHORT SLONG SRATIONAL FLOAT DOUBLE IFD LONG8 …
_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_BYTES |= {16: 8, 17: 8, 18: 8}
_KINDS = {1: "u1", 2: "u1", 3: "u2", 4: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 13: "u4"}
_KINDS |= {16: "u8", 17: "i8", 18: "u8"}
_FIRST_READ = 1024  # a directory of 50 tags; a longer one costs a second read
_MOST_TAGS = 4096


class Tag(NamedTuple):
    """An entry: ``n`` values of TIFF type ``kind``; ``field`` holds them, or where they are."""

    kind: int
    n: int
    field: bytes


class Directory(NamedTuple):
    """One IFD at byte ``at``; ``after`` is where the next one lies, 0 after the last."""

    at: int
    after: int
    entries: dict[int, bytes]  # by the tag's number; `TiffBytes.tag` takes one apart


@dataclass(frozen=True)
class TiffBytes:
    """An open TIFF file: its descriptor, byte order ("<" or ">"), kind, and first directory."""

    fd: int
    path: str
    order: str
    big: bool
    first: int
    size: int

    @cached_property
    def _entries(self) -> struct.Struct:
        return struct.Struct(self.order + ("H18s" if self.big else "H10s"))

    @cached_property
    def _parts(self) -> struct.Struct:
        return struct.Struct(self.order + ("HQ8s" if self.big else "HI4s"))

    @cached_property
    def _words(self) -> Literal["little", "big"]:
        return "little" if self.order == "<" else "big"

    @classmethod
    def of(cls, fd: int, path: str) -> TiffBytes:
        """Reads the header."""
        head = os.pread(fd, 16, 0)
        order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
        version = struct.unpack(order + "H", head[2:4])[0] if order and len(head) >= 8 else 0
        if version not in (42, 43) or (version == 43 and len(head) < 16):
            what = "is empty" if not head else f"begins with {head[:4]!r}"
            raise InputError(f"{path} {what}, which is no TIFF file; save or copy it again")
        big = version == 43
        first = (
            struct.unpack(order + "Q", head[8:]) if big else struct.unpack(order + "I", head[4:8])
        )
        return cls(fd, path, order, big, int(first[0]), os.fstat(fd).st_size)

    def directory(self, at: int) -> Directory:
        """The directory at byte ``at``."""
        head, entry, after = (8, 20, 8) if self.big else (2, 12, 4)
        data = os.pread(self.fd, _FIRST_READ, at) if 0 < at < self.size else b""
        count = int.from_bytes(data[:head], self._words)
        size = head + count * entry + after
        if count > _MOST_TAGS or not count or len(data) < head:
            raise self._damaged(f"has no page at byte {at}")
        if len(data) < size:
            data = os.pread(self.fd, size, at)
        if len(data) < size:
            raise self._damaged(f"ends in the description of the page at byte {at}")
        end = head + count * entry
        entries = dict(self._entries.iter_unpack(data[head:end]))
        return Directory(at, int.from_bytes(data[end:size], self._words), entries)

    def tag(self, directory: Directory, *numbers: int) -> Tag | None:
        """The first of the tags ``numbers`` that the directory has."""
        for number in numbers:
            entry = directory.entries.get(number)
            if entry is not None:
                return Tag(*self._parts.unpack(entry))
        return None

    def chain(self) -> Iterator[Directory]:
        """All directories, in the file's order."""
        at, seen = self.first, set()
        while at:
            if at in seen:
                raise self._damaged(f"leads from its last page back to the one at byte {at}")
            seen.add(at)
            found = self.directory(at)
            yield found
            at = found.after

    def values(self, tag: Tag, lo: int = 0, hi: int | None = None) -> np.ndarray:
        """Values [lo, hi) of an integer tag: (hi - lo,) int64. Only those are read."""
        kind = _KINDS.get(tag.kind)
        hi = tag.n if hi is None else hi
        if kind is None or not 0 <= lo <= hi <= tag.n:
            raise self._damaged(f"has {tag.n} values where {hi} integers belong")
        data = self.raw(tag, lo, hi)
        return np.frombuffer(data, self.order + kind).astype(np.int64)

    def raw(self, tag: Tag, lo: int = 0, hi: int | None = None) -> bytes:
        """The bytes of values [lo, hi) of ``tag``."""
        width = _BYTES.get(tag.kind, 1)
        hi = tag.n if hi is None else hi
        if tag.n * width <= len(tag.field):
            return tag.field[lo * width : hi * width]
        place = int.from_bytes(tag.field, self._words)
        wanted = (hi - lo) * width
        if place + lo * width + wanted > self.size:
            raise self._damaged(f"has a table at byte {place} that leaves the file")
        return os.pread(self.fd, wanted, place + lo * width)

    def _damaged(self, why: str) -> InputError:
        return InputError(
            f"{self.path} ({self.size} bytes) {why}; it is damaged or not whole: copy it again"
        )


def segment_tags(file: TiffBytes, directory: Directory) -> tuple[Tag | None, Tag | None]:
    """Where a page's strips or tiles lie, and how many bytes each has."""
    # Some writers use the tags of strips for tiles: the numbering is the tiles' all the same.
    return (
        file.tag(directory, TILE_OFFSETS, STRIP_OFFSETS),
        file.tag(directory, TILE_COUNTS, STRIP_COUNTS),
    )


def alike(file: TiffBytes, one: Directory, other: Directory) -> bool:
    """Whether two pages of ``file`` share size, sample format and compression."""
    if [one.entries.get(code) for code in SAME] == [other.entries.get(code) for code in SAME]:
        return True  # a table that is not in the entry itself would lie in one place for both
    for code in SAME:
        a, b = file.tag(one, code), file.tag(other, code)
        if a == b:
            continue
        if a is None or b is None or file.values(a).tolist() != file.values(b).tolist():
            return False
    return True


def values_start(file: TiffBytes, directory: Directory, page_bytes: int) -> int | None:
    """Where the values of an uncompressed page lie in one piece of ``page_bytes``, if they do."""
    offsets, counts = segment_tags(file, directory)
    if offsets is None:
        return None
    starts = file.values(offsets)
    if len(starts) > 1:
        if counts is None or counts.n != offsets.n:
            return None
        ends = starts + file.values(counts)
        if (ends[:-1] != starts[1:]).any() or ends[-1] - starts[0] != page_bytes:
            return None
    return int(starts[0]) if len(starts) else None
