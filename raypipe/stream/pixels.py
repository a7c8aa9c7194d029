"""Rows that are images, read and resized when they are asked for: training without a store.

`PixelSource` is the picklable handle (`raypipe.stream.reading.Source`): a folder's listing, what
each file held when it was scanned, and how a backbone wants its pictures. Opened, it decodes with a
few threads of this process; on Ray the same handle is decoded by actors (``raypipe.cluster``).
Which images can be read at all is found by `raypipe.stream.scan`; tokens are the backbone's.
"""

from __future__ import annotations

import os
import platform
import weakref
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from raypipe.backbone.preprocess import Preprocess
from raypipe.errors import BadImage, ConfigError, InputError
from raypipe.read import Decoded, Undecodable, try_read_image

DIGEST_BYTES = 16
# Beyond this one process's threads meet in Python more often than they help (PIL decodes and resizes
# without the GIL); with Ray further actors take over.
MOST_THREADS = 8
# How soon a wait for an image on a disk that hangs hears that nobody wants it any more.
_LOOK_EVERY_S = 0.5


@dataclass(frozen=True, kw_only=True)
class PixelSource:
    """Images of one folder as rows (height, width, 3) uint8, as ``preprocess.host`` gives them.

    names : file of each row; digests : xxh3_128 of each file's bytes, 16 bytes a row, as scanned;
    image_hw : pixels of every image where the backbone does not resize; readers : threads, or decode
    actors, None for as many as suit; fingerprint : of listing and contents.
    """

    folder: Path
    names: tuple[str, ...] = field(repr=False)
    digests: bytes = field(repr=False)
    preprocess: Preprocess
    image_hw: tuple[int, int]
    readers: int | None = None
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if not self.names or len(self.digests) != DIGEST_BYTES * len(self.names):
            raise ConfigError(
                f"{self.folder}: {len(self.names)} images with {len(self.digests)} bytes of digests; "
                f"give at least one image, and {DIGEST_BYTES} bytes each"
            )

    @property
    def path(self) -> Path:
        """Where the rows come from, for messages."""
        return self.folder

    @property
    def n_rows(self) -> int:
        """Images, those that cannot be read included."""
        return len(self.names)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(height, width, 3) after resizing and cropping."""
        return (*self.preprocess.host_size(*self.image_hw), 3)

    @property
    def row_bytes(self) -> int:
        """Bytes of one decoded image."""
        return int(np.prod(self.row_shape))

    @property
    def dtype(self) -> str:
        """uint8: normalising is the backbone's, on its device, at a quarter of float32's bytes."""
        return "uint8"

    @property
    def stored_dtype(self) -> np.dtype:
        """As ``dtype``."""
        return np.dtype(np.uint8)

    def open(self) -> PixelReader:
        """Decode in this process."""
        return PixelReader(self)

    def check(self, rows: np.ndarray) -> None:
        """Raise ConfigError for a row that is not there."""
        if rows.min() < 0 or rows.max() >= self.n_rows:
            raise ConfigError(
                f"rows {rows.min()}..{rows.max()} asked of {self.folder}, which has {self.n_rows} "
                "images; was the split made for another folder?"
            )

    def decode_row(self, row: int, out: np.ndarray) -> None:
        """Read image ``row`` into ``out`` (height, width, 3) uint8.

        Raises BadImage when it cannot be read any more, InputError when it holds other bytes than
        it was scanned with: a run never trains on images that changed under it.
        """
        path = self.folder / self.names[row]
        found = decode(path, self.preprocess, self.image_hw, out)
        if isinstance(found, Undecodable):
            raise BadImage(
                f"{path} cannot be read ({found.reason}), and could when the run began; mend it and "
                "give the same command again, or start over with --no-resume"
            )
        at = DIGEST_BYTES * row
        if bytes.fromhex(found.digest) != self.digests[at : at + DIGEST_BYTES]:
            raise InputError(
                f"{path} holds other bytes than when the run began; put the image back, or start "
                "over with --no-resume"
            )

    def decode_rows(self, rows: np.ndarray) -> np.ndarray:
        """``rows`` (n,) one after the other, as (n, height, width, 3) uint8; raises as above."""
        pixels = np.empty((len(rows), *self.row_shape), np.uint8)
        for place, row in enumerate(rows.tolist()):
            self.decode_row(row, pixels[place])
        return pixels


class PixelReader:
    """`raypipe.stream.reading.RowReader` of a `PixelSource`, by threads of this process.

    A batch under way holds its own block of pixels: of ``depth`` batches in a gatherer's ring, as
    many bytes again are held here until they are copied there.
    """

    def __init__(self, source: PixelSource) -> None:
        self.source = source
        threads = source.readers or min(MOST_THREADS, _cores())
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="raypipe-decode")
        # What nobody waits for any more is not worth decoding.
        weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def check(self, rows: np.ndarray) -> None:
        """Raise ConfigError for rows that are not there."""
        self.source.check(rows)

    def start(self, rows: np.ndarray) -> Decoding:
        """Begin to decode ``rows``; the call waits, and gives (n, height, width, 3) uint8."""
        pixels = np.empty((len(rows), *self.source.row_shape), np.uint8)
        jobs = [
            self._pool.submit(self.source.decode_row, row, pixels[place])
            for place, row in enumerate(rows.tolist())
        ]
        return Decoding(self, jobs, pixels)


class Decoding:
    """A batch being decoded: `raypipe.stream.reading.Cancellable`."""

    def __init__(self, reader: PixelReader, jobs: list[Future[None]], pixels: np.ndarray) -> None:
        self._reader = reader  # who waits keeps its threads, whatever becomes of its owner
        self._jobs, self._pixels = jobs, pixels
        self._cancelled = False

    def __call__(self) -> np.ndarray:
        """Wait; the pixels, or the first error."""
        for job in self._jobs:
            while not (job.done() or self._cancelled):
                wait([job], timeout=_LOOK_EVERY_S)
            if self._cancelled:
                raise CancelledError
            job.result()
        return self._pixels

    def cancel(self) -> None:
        """Images that no thread has begun are left; the block of pixels is nobody else's."""
        self._cancelled = True
        for job in self._jobs:
            job.cancel()


def decode(
    path: Path, preprocess: Preprocess, image_hw: tuple[int, int], out: np.ndarray
) -> Decoded | Undecodable:
    """The picture at ``path``, resized and cropped into ``out`` (height, width, 3), or why not.

    The rule of extraction: what is the picture's own fault comes back as Undecodable, to be marked.
    Raises InputError for what is not: a file that cannot be opened at all, and a picture of another
    size than ``image_hw`` where the backbone does not resize.
    """
    image = try_read_image(path)
    if isinstance(image, Undecodable):
        if not image.digest:  # it was listed, and not even its bytes can be had
            raise InputError(
                f"{platform.node()} cannot open {path} ({image.reason}); put --data-dir on a disk that "
                "every machine mounts, or mend or remove the file"
            )
        return image
    if preprocess.resize is None and image.pixels.shape[:2] != image_hw:
        got = image.pixels.shape[:2]
        raise InputError(
            f"{path.name} has {got[0]}x{got[1]} pixels, the first image {image_hw[0]}x{image_hw[1]}; "
            "the backbone does not resize: give --image-size, or sort them apart"
        )
    try:
        out[...] = preprocess.host(image.pixels)
    except BadImage as error:  # too narrow to be resized
        return Undecodable(reason=str(error), digest=image.digest, size_bytes=image.size_bytes)
    return image


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
