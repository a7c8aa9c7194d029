"""The files of pictures, open where they are read: by crops, a bounded number at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from raypipe.errors import InputError
from raypipe.read.source2d import ImageSource, open_image
from raypipe.segment.channels import open_pixels
from raypipe.segment.pictures import Picture

# Handles kept: some hundred bytes each, and no descriptor (``read.tiff`` bounds those by itself). One
# that is not kept is understood anew for its next crop, and a PNG then decoded, too.
_MOST_OPEN = 1 << 14

Span = tuple[int, int]
# A file, and how it is read: as an image by these axes, or as a mask.
_Key = tuple[Path, str | None, bool]


class Readers:
    """Open images and masks, by path; any thread may read."""

    def __init__(self) -> None:
        self._open: OrderedDict[_Key, ImageSource] = OrderedDict()
        self._lock = threading.Lock()

    def image(self, picture: Picture, rows: Span, cols: Span) -> np.ndarray:
        """(channels, h, w) of the image's own dtype; rows, cols : of the file's page."""
        pixels = self._image(picture).read(picture.frame, slice(*rows), slice(*cols))
        return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)

    def mask(self, picture: Picture, rows: Span, cols: Span) -> np.ndarray:
        """(h, w) of the mask's own dtype."""
        mask = self._of((picture.mask, None, True))
        return mask.read(picture.frame, slice(*rows), slice(*cols))

    def dtype(self, picture: Picture) -> np.dtype:
        """Of the image."""
        return self._image(picture).dtype

    def _image(self, picture: Picture) -> ImageSource:
        found = self._of((picture.image, picture.axes, False))
        _check_as_listed(found, picture)
        return found

    def _of(self, key: _Key) -> ImageSource:
        with self._lock:
            found = self._open.get(key)
            if found is not None:
                self._open.move_to_end(key)
                return found
        # Not under the lock: a slow disk holds up nobody else.
        path, axes, is_mask = key
        found = open_image(path, alone=False) if is_mask else open_pixels(path, axes)
        with self._lock:
            found = self._open.setdefault(key, found)
            if len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)
            return found


def _check_as_listed(image: ImageSource, picture: Picture) -> None:
    """Raises InputError for pages that were pictures when the run was fitted, and are channels now: by
    versions that did not ask the file.
    """
    n, channels = image.shape[0], image.shape[3] if len(image.shape) > 3 else 1
    if picture.frame >= n or picture.channels != channels:
        raise InputError(
            f"{picture.name} was fitted as {picture.channels} channel(s), and the file is read as {n}"
            f" picture(s) of {channels}; fit again, with --axes FYX where its pages are pictures"
        )
