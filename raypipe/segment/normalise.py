"""How pixel values become the numbers that a model sees: two numbers a channel, of the training images.

    x = (value - low) / (high - low)

``low`` and ``high`` are percentiles, or the smallest and largest value, of all training pixels, found in
one pass a strip of rows at a time (two for floats, whose histogram needs the range first, and more
where a few pixels lie far beyond all others). They are
saved with the model: an image gives the same numbers alone, in a crop, or as a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from raypipe.errors import ConfigError, InputError
from raypipe.segment.pictures import Picture
from raypipe.segment.readers import Readers

Kind = Literal["percentile", "minmax", "none"]
# Of a float image's range: finer than 16 bits, and 8 MiB a channel.
_BINS = 1 << 20
# Percentiles this few bins apart are looked for again, at most so often: to a hot pixel of 1e15.
_BINS_APART, _PASSES = 1 << 12, 3
_STRIP_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """``low`` and ``high`` of each channel. Raises ConfigError unless low < high, all finite."""

    kind: Kind
    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        pairs = list(zip(self.low, self.high, strict=True))
        if not pairs or not all(np.isfinite(pair).all() and pair[0] < pair[1] for pair in pairs):
            raise ConfigError(
                f"normalisation from {self.low} to {self.high}: low must be below high in each channel;"
                " give images that are not constant, or --normalise none"
            )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Normalisation:
        """Of what ``dataclasses.asdict`` made, also by way of JSON. Raises KeyError, TypeError."""
        return cls(kind=fields["kind"], low=tuple(fields["low"]), high=tuple(fields["high"]))

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """(channels, h, w) of any number type -> float32 of the same shape, a new array."""
        low = np.asarray(self.low, np.float32)[:, None, None]
        scale = 1 / (np.asarray(self.high, np.float64) - np.asarray(self.low, np.float64))
        return (pixels.astype(np.float32) - low) * scale.astype(np.float32)[:, None, None]


def measure(
    pictures: Sequence[Picture], kind: Kind, *, low: float, high: float, readers: Readers
) -> Normalisation:
    """Of the regions of ``pictures``, read a strip at a time. low, high : percentiles, 0 to 100.

    Raises InputError (values that are not finite), ConfigError (constant images).
    """
    channels = pictures[0].channels
    if kind == "none":
        return Normalisation(kind=kind, low=(0.0,) * channels, high=(1.0,) * channels)
    if kind == "minmax":
        ends = _range(pictures, channels, readers)
        return Normalisation(kind=kind, low=tuple(ends[0].tolist()), high=tuple(ends[1].tolist()))
    found = _percentiles(pictures, channels, (low, high), readers)
    return Normalisation(kind=kind, low=tuple(found[0]), high=tuple(found[1]))


def _range(pictures: Sequence[Picture], channels: int, readers: Readers) -> np.ndarray:
    """(2, channels) float64: smallest and largest value."""
    ends = np.array([[np.inf] * channels, [-np.inf] * channels])
    for pixels, name in _strips(pictures, readers):
        if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise InputError(f"{name} holds values that are not finite; mend the image first")
        flat = pixels.reshape(channels, -1)
        ends[0] = np.minimum(ends[0], flat.min(1))
        ends[1] = np.maximum(ends[1], flat.max(1))
    return ends


def _percentiles(
    pictures: Sequence[Picture], channels: int, wanted: tuple[float, float], readers: Readers
) -> tuple[list[float], list[float]]:
    """The values below which ``wanted`` percent of the pixels lie, of each channel."""
    ends = _range(pictures, channels, readers)
    whole = all(readers.dtype(p).kind in "uib" for p in pictures)
    exact = whole and bool((ends[1] - ends[0] < _BINS).all())
    for _ in range(_PASSES):
        spans = ends[1] - ends[0]
        # A bin a value where values are whole and few; else equal parts of the range.
        scale = np.where(exact | (spans == 0), 1.0, (_BINS - 1) / np.where(spans == 0, 1, spans))
        counts = _counted(pictures, ends[0], scale, readers)
        places = np.array([_places(count, wanted) for count in counts]).T
        found = ends[0] + places / scale
        coarse = (places[1] - places[0] < _BINS_APART) & (spans > 0)
        if exact or not coarse.any():
            break
        # One pixel far beyond the others leaves a few bins for them all: again, within those.
        ends = np.where(coarse, ends[0] + np.add(places, [[0], [1]]) / scale, ends)
    return found[0].tolist(), found[1].tolist()


def _counted(
    pictures: Sequence[Picture], start: np.ndarray, scale: np.ndarray, readers: Readers
) -> np.ndarray:
    """(channels, 1 + bins + 1): pixels below the first bin, in each of them, and above the last."""
    counts = np.zeros((len(start), _BINS + 2), np.int64)
    for pixels, _ in _strips(pictures, readers):
        for channel, values in enumerate(pixels.reshape(len(start), -1)):
            at = np.floor((values.astype(np.float64) - start[channel]) * scale[channel])
            places = np.clip(at, -1, _BINS).astype(np.int64) + 1
            counts[channel] += np.bincount(places, minlength=_BINS + 2)
    return counts


def _places(counts: np.ndarray, wanted: tuple[float, float]) -> list[int]:
    """The bins, from 0 on, of the pixels below which ``wanted`` percent lie; ``counts`` of `_counted`."""
    below = np.cumsum(counts)
    ranks = [percent / 100 * (below[-1] - 1) for percent in wanted]
    places = [int(np.searchsorted(below, rank, side="right")) - 1 for rank in ranks]
    return [min(max(place, 0), _BINS - 1) for place in places]


def _strips(pictures: Sequence[Picture], readers: Readers) -> Iterator[tuple[np.ndarray, str]]:
    """(channels, h, w) strips of whole rows of every region, each of about 16 MiB, and its name."""
    for picture in pictures:
        row_bytes = picture.shape[1] * picture.channels * readers.dtype(picture).itemsize
        step = max(1, _STRIP_BYTES // max(1, row_bytes))
        for top in range(picture.rows[0], picture.rows[1], step):
            rows = top, min(top + step, picture.rows[1])
            yield readers.image(picture, rows, picture.cols), picture.name
