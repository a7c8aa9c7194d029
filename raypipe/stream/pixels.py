"""Rows that are images, read and resized when they are asked for: training without a store.

`PixelSource` is the picklable handle (`raypipe.stream.reading.Source`): a folder's listing, what
each file held when it was scanned, and how a backbone wants its pictures. Opened, it decodes with a
few threads of this process (`raypipe.stream.decoding`); on Ray the same handle is decoded by actors
(``raypipe.cluster``).
Which images can be read at all is found by `raypipe.stream.scan`; tokens are the backbone's.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from raypipe.backbone.preprocess import Preprocess
from raypipe.errors import BadImage, ConfigError, InputError
from raypipe.read import Decoded, Undecodable, try_read_image
from raypipe.stream.decoding import RowDecoder, Terms, decode_rows

DIGEST_BYTES = 16
TERMS = Terms(
    row="image",
    readers="--decode-threads",
    data="--data-dir",
    smaller="make the images smaller (--image-size)",
)


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
    def terms(self) -> Terms:
        """Those of extraction."""
        return TERMS

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

    def open(self) -> RowDecoder:
        """Decode in this process."""
        return RowDecoder(self)

    def name_of(self, row: int) -> str:
        """The file of ``row``."""
        return self.names[row]

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
        return decode_rows(self, rows)


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
