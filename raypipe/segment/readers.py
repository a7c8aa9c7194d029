"""The files of pictures, open where they are read: by crops, never whole, a bounded number at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np

from raypipe.read.source2d import ImageSource, open_image
from raypipe.segment.pictures import Picture

# Handles kept: a map and a descriptor each; a process may have 1024 descriptors by default.
_MOST_OPEN = 128

Span = tuple[int, int]


class Readers:
    """Open images and masks, by path; any thread may read."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, ImageSource] = OrderedDict()
        self._lock = threading.Lock()

    def image(self, picture: Picture, rows: Span, cols: Span) -> np.ndarray:
        """(channels, h, w) of the image's own dtype; rows, cols : of the file's page."""
        pixels = self._of(picture.image).read(picture.frame, slice(*rows), slice(*cols))
        return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)

    def mask(self, picture: Picture, rows: Span, cols: Span) -> np.ndarray:
        """(h, w) of the mask's own dtype."""
        return self._of(picture.mask).read(picture.frame, slice(*rows), slice(*cols))

    def dtype(self, picture: Picture) -> np.dtype:
        """Of the image."""
        return self._of(picture.image).dtype

    def _of(self, path: Path) -> ImageSource:
        with self._lock:
            found = self._open.get(path)
            if found is None:
                found = self._open[path] = open_image(path, alone=False)
            self._open.move_to_end(path)
            if len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)
            return found
