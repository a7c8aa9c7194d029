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
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from raypipe.errors import InputError, MissingInput
from raypipe.read.tiff.decoder import Decoder, build_decoder
from raypipe.read.tiff.ifd import Directory, TiffBytes, segment_tags
from raypipe.read.tiff.kept import kept
from raypipe.read.tiff.part import Part
from raypipe.read.tiff.segments import Segment

#: Descriptors held open, of a stack of many files: far below the usual limit of 1,024 a process.
MOST_OPEN = 64
# A row of a crop is a read of its own, unless what lies between two of them is so short that
# copying it costs less than a call.
_GAP_BYTES = 4 << 10
_BLOCK_BYTES = 1 << 20

Span = tuple[int, int]


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
        self._making = threading.Lock()

    @cached_property
    def _file(self) -> TiffBytes:
        return TiffBytes.of(self._fd, str(self.part.path))

    @cached_property
    def _decoder(self) -> Decoder:
        with self._making:  # tifffile builds it through a file position
            return build_decoder(self.part)

    def copy_plane(self, page: int, plane: int, rows: Span, cols: Span, out: np.ndarray) -> None:
        """The crop of a plane of a "map" part into ``out`` (rows, cols[, samples]), C-contiguous."""
        part = self.part
        item = part.stored.itemsize
        pixel = part.page.samples * item
        row = part.page.width * pixel
        start = part.at[page] + plane * part.plane_bytes + rows[0] * row + cols[0] * pixel
        width = (cols[1] - cols[0]) * pixel
        flat = out.reshape(-1).view(np.uint8)
        if width == row:
            self._fill(flat, int(start))
        elif row - width > _GAP_BYTES:
            for k in range(rows[1] - rows[0]):
                self._fill(flat[k * width : (k + 1) * width], int(start) + k * row)
        else:
            self._fill_blocks(flat.reshape(-1, width), int(start), row)
        if not part.stored.isnative:
            out.byteswap(inplace=True)

    def decode_plane(self, page: int, plane: int, rows: Span, cols: Span) -> np.ndarray:
        """The crop of a plane of a "pages" part: (rows, cols, samples), native, the caller's own."""
        directory = self._file.directory(int(self.part.at[page]))
        segments = list(self._decoder.grid.touched(plane, rows, cols))
        blocks = self._blocks(directory, segments, plane % self.part.page.depth)
        if len(segments) == 1 and segments[0].whole:
            block, shared = next(blocks)
            if not shared:  # a strip that is the page: not copied, so that two are never held
                return block[: rows[1] - rows[0], : cols[1] - cols[0]]
            return block[: rows[1] - rows[0], : cols[1] - cols[0]].copy()
        shape = (rows[1] - rows[0], cols[1] - cols[0], self.part.page.samples)
        out = np.empty(shape, self.part.stored.newbyteorder("="))
        for one, (block, _) in zip(segments, blocks, strict=True):
            (top, bottom), (left, right) = one.rows, one.cols
            out[top - rows[0] : bottom - rows[0], left - cols[0] : right - cols[0]] = block[
                top - one.y0 : bottom - one.y0, left - one.x0 : right - one.x0
            ]
        return out

    def _blocks(
        self, directory: Directory, segments: list[Segment], z: int
    ) -> Iterator[tuple[np.ndarray, bool]]:
        """Each segment's plane at depth ``z``, (height, width, samples), and whether it is kept."""
        if not segments:
            return
        offsets, counts = segment_tags(self._file, directory)
        if offsets is None or counts is None:
            raise self._damaged(directory, "has no table of its strips or tiles")
        # Only the part of the tables that is needed: an image of 100,000 tiles has large ones.
        lo, hi = segments[0].index, segments[-1].index + 1
        starts, sizes = (self._file.values(tag, lo, hi).tolist() for tag in (offsets, counts))
        seg_depth = self._decoder.grid.seg_depth
        for one in segments:
            key = (self.part.key, directory.at, one.index)
            block = kept.get(key)
            shared = block is not None
            if block is None:
                data = self._encoded(directory, one, starts[one.index - lo], sizes[one.index - lo])
                block = self._decoder.decode(self._file, directory, one.index, data)
                shared = not block.flags.writeable
                if not one.whole or seg_depth > 1:
                    kept.put(key, block, self.part.page_bytes)
                    shared = True
            yield block[z % seg_depth], shared

    def _encoded(self, directory: Directory, one: Segment, offset: int, count: int) -> bytes | None:
        """The bytes of a segment as stored; None for one that the writer left empty."""
        if not offset or not count:
            return None
        data = os.pread(self._fd, count, offset) if offset < self.part.size_bytes else b""
        if len(data) < count:
            raise self._damaged(
                directory, f"wants bytes {offset} to {offset + count} for strip or tile {one.index}"
            )
        return data

    def _fill_blocks(self, out: np.ndarray, start: int, row: int) -> None:
        """``out`` (rows, width) from rows that lie ``row`` bytes apart, many with one read."""
        width = out.shape[1]
        together = max(1, _BLOCK_BYTES // row)
        for k in range(0, len(out), together):
            some = out[k : k + together]
            block = np.empty(len(some) * row, np.uint8)
            # No gap after the last row: the file may end there.
            self._fill(block[: block.size - row + width], start + k * row)
            some[:] = block.reshape(-1, row)[:, :width]

    def _fill(self, out: np.ndarray, at: int) -> None:
        """``out`` (bytes,) uint8 from byte ``at`` on."""
        view, got = out.data, 0
        while got < len(view):
            try:
                n = os.preadv(self._fd, [view[got:]], at + got)
            except OSError as error:
                raise InputError(
                    f"{self.part.path} cannot be read at byte {at + got} ({error.strerror}); "
                    "copy it again"
                ) from error
            if not n:
                raise InputError(
                    f"{self.part.path} was cut short while it was open: it ends before byte "
                    f"{at + len(view)}; copy it again and open the stack again"
                )
            got += n

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
