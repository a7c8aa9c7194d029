"""Crops as rows of a training stream: read off the files, normalised, augmented when they are asked for.

`CropSource` is the picklable handle (`raypipe.stream.decoding.Decoded`). Row ``epoch * n + sample`` is
sample ``sample`` of ``n`` under the augmentation of ``epoch`` (`raypipe.train.task.epoch_stride`).
Samples come first from training pictures, cut at a random place; then from validation pictures, whose
crops lie on a grid that covers each region, and are never augmented. A row is

    (channels + 1, crop, crop) float32:  normalised image; labels, `IGNORE` where nothing is counted
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from raypipe.errors import ConfigError, InputError
from raypipe.segment import augment
from raypipe.segment.augment import AugmentConfig, Span
from raypipe.segment.labels import IGNORE, Target, to_plane
from raypipe.segment.normalise import Normalisation
from raypipe.segment.pictures import Picture
from raypipe.segment.readers import Readers
from raypipe.stream.decoding import RowDecoder, Terms, decode_rows

TERMS = Terms(
    row="crop", readers="--readers", data="--data", smaller="make the crops smaller (--crop)"
)
# Epochs that have row numbers: more than any run, few enough for int64.
_EPOCHS = 1 << 31


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """How masks are read; see `raypipe.segment.labels`."""

    target: Target = "foreground"
    classes: int = 1
    ignore: int | None = None

    def plane(self, mask: np.ndarray) -> np.ndarray:
        """(h, w) int16."""
        return to_plane(mask, self.target, self.classes, self.ignore)


@dataclass(frozen=True, eq=False, kw_only=True)
class CropSource:
    """Rows of crops.

    picture_of : (n,) int32, the picture of each sample. corner : (n, 2) int64, where a validation
    sample's grid cell begins in the file's page; -1 for training samples. fingerprint : of files and
    labelling. readers : threads, or actors on Ray.
    """

    pictures: tuple[Picture, ...] = field(repr=False)
    picture_of: np.ndarray = field(repr=False)
    corner: np.ndarray = field(repr=False)
    crop: int
    labelling: Labelling
    normalisation: Normalisation
    augment: AugmentConfig
    seed: int
    readers: int | None = None
    fingerprint: str = ""

    @property
    def samples(self) -> int:
        """Rows of one epoch."""
        return len(self.picture_of)

    @property
    def n_rows(self) -> int:
        """Of all epochs."""
        return self.samples * _EPOCHS

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(channels + 1, crop, crop)."""
        return self.pictures[0].channels + 1, self.crop, self.crop

    @property
    def row_bytes(self) -> int:
        """Bytes of one crop."""
        return 4 * int(np.prod(self.row_shape))

    @property
    def dtype(self) -> str:
        """float32, labels too: they are small whole numbers."""
        return "float32"

    @property
    def stored_dtype(self) -> np.dtype:
        """As ``dtype``."""
        return np.dtype(np.float32)

    @property
    def path(self) -> Path:
        """Where the first of them comes from, for messages."""
        return self.pictures[0].image.parent

    @property
    def terms(self) -> Terms:
        """Those of segmentation."""
        return TERMS

    def name_of(self, row: int) -> str:
        """Its picture."""
        return self.pictures[int(self.picture_of[row % self.samples])].name

    def check(self, rows: np.ndarray) -> None:
        """Raise ConfigError for a row that is not there."""
        if rows.min() < 0 or rows.max() >= self.n_rows:
            raise ConfigError(f"rows {rows.min()}..{rows.max()} asked of {self.samples} samples")

    def open(self) -> RowDecoder:
        """Crops made by threads of this process."""
        return RowDecoder(self)

    def decode_rows(self, rows: np.ndarray) -> np.ndarray:
        """``rows`` (n,) as (n, *row_shape) float32."""
        return decode_rows(self, rows)

    def decode_row(self, row: int, out: np.ndarray) -> None:
        """Make ``row`` in ``out`` (*row_shape). Raises as the files' readers, InputError (not finite)."""
        epoch, sample = divmod(row, self.samples)
        picture = self.pictures[int(self.picture_of[sample])]
        top, left = (int(at) for at in self.corner[sample])
        if top < 0:
            image, plane = self._drawn(picture, sample, epoch)
        else:
            image, plane = self._cell(picture, top, left)
        if not np.isfinite(image).all():
            raise InputError(
                f"{picture.name} holds values that are not finite; mend the image first"
            )
        out[:-1], out[-1] = image, plane

    def _drawn(self, picture: Picture, sample: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        d = augment.draw(self.augment, self.crop, self.seed, sample, epoch)
        rows, cols = augment.window(d, (picture.rows, picture.cols), self.crop)
        return augment.apply(d, *self._window(picture, rows, cols), self.crop)

    def _cell(self, picture: Picture, top: int, left: int) -> tuple[np.ndarray, np.ndarray]:
        """The crop of a grid cell, moved inwards at the region's end; what cells before it count is
        `IGNORE`.
        """
        starts = [
            min(at, max(span[0], span[1] - self.crop))
            for at, span in zip((top, left), (picture.rows, picture.cols), strict=True)
        ]
        rows, cols = ((at, at + self.crop) for at in starts)
        image, plane = self._window(picture, rows, cols)
        plane[: top - starts[0]] = IGNORE
        plane[:, : left - starts[1]] = IGNORE
        return image, plane

    def _window(self, picture: Picture, rows: Span, cols: Span) -> tuple[np.ndarray, np.ndarray]:
        """Normalised pixels and labels of [rows, cols), whatever of it lies beyond the region."""
        return read_window(_readers(), picture, rows, cols, self.normalisation, self.labelling)


def read_window(
    readers: Readers,
    picture: Picture,
    rows: Span,
    cols: Span,
    normalisation: Normalisation,
    labelling: Labelling,
) -> tuple[np.ndarray, np.ndarray]:
    """(c, h, w) float32 and (h, w) int16 of [rows, cols) of the page; beyond the picture's region the
    image is mirrored and the labels are `IGNORE`.
    """
    inside = [
        (max(lo, span[0]), min(hi, span[1]))
        for (lo, hi), span in zip((rows, cols), (picture.rows, picture.cols), strict=True)
    ]
    image = normalisation.apply(readers.image(picture, *inside))
    plane = _labels(readers, picture, inside, labelling)
    pads = [(got[0] - lo, hi - got[1]) for (lo, hi), got in zip((rows, cols), inside, strict=True)]
    if any(any(pad) for pad in pads):
        image = np.pad(image, [(0, 0), *pads], mode="reflect")
        plane = np.pad(plane, pads, constant_values=IGNORE)
    return image, plane


def _labels(
    readers: Readers, picture: Picture, inside: list[Span], labelling: Labelling
) -> np.ndarray:
    """(h, w) int16 of [rows, cols) within the region: the same numbers wherever a crop is cut."""
    if labelling.target != "boundary":
        return labelling.plane(readers.mask(picture, *inside))
    # Whether a pixel is the outermost of its object is seen on its neighbours.
    around = [
        (max(lo - 1, span[0]), min(hi + 1, span[1]))
        for (lo, hi), span in zip(inside, (picture.rows, picture.cols), strict=True)
    ]
    rows, cols = (
        slice(lo - start, hi - start) for (lo, hi), (start, _) in zip(inside, around, strict=True)
    )
    return labelling.plane(readers.mask(picture, *around))[rows, cols]


def grid_corners(picture: Picture, crop: int) -> list[tuple[int, int]]:
    """Where the cells of ``crop`` pixels begin that cover the picture's region."""
    return [
        (top, left) for top in range(*picture.rows, crop) for left in range(*picture.cols, crop)
    ]


_here = threading.Lock()
_opened: Readers | None = None


def _readers() -> Readers:
    """This process's open files: one handle a file, whatever the number of threads and sources."""
    global _opened
    with _here:
        if _opened is None:
            _opened = Readers()
        return _opened
