"""A TIFF file open in this process: one descriptor, shared by all threads; crops are copied out.

All reading is by pread. It needs no file position (so no lock), a file that was cut short under it
is an error and not SIGBUS, which a map would need a guard against (``raypipe.stream.guarded``, a
layer above), and what it reads counts for nobody's memory but the crop's own bytes.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from functools import cached_property

import numpy as np

from raypipe.errors import InputError, MissingInput
from raypipe.read.tiff.decoder import Decoder, build_decoder
from raypipe.read.tiff.ifd import Directory, TiffBytes, segment_tags
from raypipe.read.tiff.kept import kept
from raypipe.read.tiff.part import Part
from raypipe.read.tiff.segments import Segment
from raypipe.read.tiff.strided import copy_rows

#: Descriptors held open, of a stack of many files: far below the usual limit of 1,024 a process.
MOST_OPEN = 64

Span = tuple[int, int]
Place = tuple[int, int, int]  # number of a strip or tile, its offset and bytes


class OpenPart:
    """The file of one `Part`. Raises MissingInput, InputError (changed since it was indexed)."""

    def __init__(self, part: Part) -> None:
        self.part = part
        try:
            self._fd = os.open(part.path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise MissingInput(
                f"{part.path} is not there; put it where this process finds it"
            ) from error
        except OSError as error:
            raise InputError(f"{part.path} cannot be opened ({error.strerror}); mend it") from error
        weakref.finalize(self, os.close, self._fd)
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (part.size_bytes, part.mtime_ns):
            raise InputError(
                f"{part.path} was changed since the stack was opened ({part.size_bytes} bytes "
                f"then, {now.st_size} now); wait until it is written, then open the stack again"
            )

    @cached_property
    def _file(self) -> TiffBytes:
        return TiffBytes.of(self._fd, str(self.part.path))

    @cached_property
    def _decoder(self) -> Decoder:
        return build_decoder(self.part)

    def copy_plane(self, page: int, plane: int, rows: Span, cols: Span, out: np.ndarray) -> None:
        """The crop of a plane of a "map" part into ``out`` (rows, cols[, samples]), C-contiguous."""
        part = self.part
        pixel = part.page.samples * part.stored.itemsize
        row = part.page.width * pixel
        start = part.at[page] + plane * part.plane_bytes + rows[0] * row + cols[0] * pixel
        bytes_out = out.reshape(rows[1] - rows[0], -1).view(np.uint8)
        copy_rows(self._fd, str(part.path), bytes_out, int(start), row)
        if not part.stored.isnative:
            out.byteswap(inplace=True)

    def decode_plane(self, page: int, plane: int, rows: Span, cols: Span, out: np.ndarray) -> None:
        """The crop of a plane of a "pages" part into ``out`` (rows, cols, samples), C-contiguous."""
        directory = self._file.directory(int(self.part.at[page]))
        segments = list(self._decoder.grid.touched(plane, rows, cols))
        z = plane % self.part.page.depth % self._decoder.grid.seg_depth
        for one, place in zip(segments, self._tables(directory, segments), strict=True):
            (top, bottom), (left, right) = one.rows, one.cols
            into = out[top - rows[0] : bottom - rows[0], left - cols[0] : right - cols[0]]
            if not (one.whole and self._straight(directory, place, into)):
                # Not bound to a name: it would live on while the next one is decoded.
                into[...] = self._block(directory, one, place)[
                    z, top - one.y0 : bottom - one.y0, left - one.x0 : right - one.x0
                ]

    def _tables(self, directory: Directory, segments: list[Segment]) -> list[Place]:
        """(number, offset, bytes) of each segment."""
        if not segments:
            return []
        offsets, counts = segment_tags(self._file, directory)
        if offsets is None or counts is None:
            raise self._damaged(directory, "has no table of its strips or tiles")
        # Only the part of the tables that is needed: an image of 100,000 tiles has large ones.
        lo, hi = segments[0].index, segments[-1].index + 1
        starts, sizes = (self._file.values(tag, lo, hi).tolist() for tag in (offsets, counts))
        return [(one.index, starts[one.index - lo], sizes[one.index - lo]) for one in segments]

    def _straight(self, directory: Directory, place: Place, into: np.ndarray) -> bool:
        """Decode a segment that ``into`` takes all of without a copy, if that can be."""
        if not self._decoder.fits(into):
            return False
        kept.make_room(into.nbytes, self.part.page_bytes)  # so that two pages are never held
        data = self._encoded(directory, place)
        return data is not None and self._decoder.decode_into(data, into)

    def _block(self, directory: Directory, one: Segment, place: Place) -> np.ndarray:
        """All of segment ``one``: (depth, height, width, samples), native, not to be written to."""
        key = (self.part.key, directory.at, one.index)
        block = kept.get(key)
        if block is not None:
            return block
        grid = self._decoder.grid
        samples = self.part.page.samples
        kept.make_room(grid.seg_items * samples * self.part.stored.itemsize, self.part.page_bytes)
        data = self._encoded(directory, place)
        block = self._decoder.decode(self._file, directory, one.index, data)
        if not one.whole or grid.seg_depth > 1:
            kept.put(key, block, self.part.page_bytes)
        return block

    def _encoded(self, directory: Directory, place: Place) -> bytes | None:
        """The bytes of a segment as stored; None for one that the writer left empty."""
        index, offset, count = place
        if not offset or not count:
            return None
        inside = offset + count <= self.part.size_bytes
        data = os.pread(self._fd, count, offset) if inside else b""
        if len(data) < count:
            raise self._damaged(
                directory, f"wants bytes {offset} to {offset + count} for strip or tile {index}"
            )
        return data

    def _damaged(self, directory: Directory, why: str) -> InputError:
        return InputError(
            f"{self.part.path} ({self.part.size_bytes} bytes): the page at byte {directory.at} "
            f"{why}; it is damaged or not whole: copy it again"
        )


_open: OrderedDict[tuple[object, ...], OpenPart] = OrderedDict()
_lock = threading.Lock()


def opened(part: Part) -> OpenPart:
    """``part``'s file, open in this process: the same for all who ask, the oldest are closed."""
    key = (*part.key, part.keyframe, part.way)
    with _lock:
        found = _open.get(key)
        if found is not None:
            _open.move_to_end(key)
            return found
    found = OpenPart(part)  # not under the lock: a slow disk holds up nobody else
    with _lock:
        _open[key] = found
        while len(_open) > MOST_OPEN:
            _open.popitem(last=False)  # closed when its last reader is done
    return found


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
