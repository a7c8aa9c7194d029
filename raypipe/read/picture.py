"""A PNG, JPEG or other picture as one frame, its samples as they are stored.

Unlike ``images``, which makes RGB of 8 bits for backbones, nothing is converted here: 16-bit grey
stays so, a palette's picture gives its indices (label masks are kept that way), alpha is a channel.
The file is compressed as a whole, so a part of it costs the whole: what was read last is kept, up
to ``kept.KEEP_BYTES``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raypipe.errors import BadImage, ConfigError, InputError
from raypipe.read.tiff.kept import kept
from raypipe.read.tiff.span import span

_PNG = b"\x89PNG\r\n\x1a\n"
# Where a PNG says how many bits a sample has, and which kind of samples.
_PNG_BITS, _PNG_KIND = 24, 25


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """One picture; `raypipe.read.source2d.ImageSource`.

    shape : (1, height, width) or (1, height, width, channels)
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    size_bytes: int
    mtime_ns: int

    def read(self, frame: int, rows: slice = slice(None), cols: slice = slice(None)) -> np.ndarray:
        """Pixels (rows, cols[, channels]). Raises ConfigError, InputError."""
        if frame != 0:
            raise ConfigError(f"frame {frame} asked of {self.path}, which has 1; ask for frame 0")
        top, bottom = span(rows, self.shape[1])
        left, right = span(cols, self.shape[2])
        return self._pixels()[top:bottom, left:right].copy()

    def _pixels(self) -> np.ndarray:
        key = (str(self.path), self.size_bytes, self.mtime_ns)
        found = kept.get(key)
        if found is not None:
            return found
        self._check_unchanged()
        pixels = _decode(self.path)
        if pixels.shape != self.shape[1:] or pixels.dtype != self.dtype:
            raise InputError(f"image {self.path} was changed while in use; run again")
        kept.put(key, pixels, pixels.nbytes)
        return pixels

    def _check_unchanged(self) -> None:
        try:
            stat = self.path.stat()
        except OSError as error:
            raise InputError(f"image {self.path} cannot be read ({error.strerror})") from error
        if (stat.st_size, stat.st_mtime_ns) != (self.size_bytes, self.mtime_ns):
            raise InputError(f"image {self.path} was changed while in use; run again")


def open_picture(path: Path) -> Picture:
    """The picture at ``path``, which is read once, to know that it can be. Raises BadImage."""
    path = Path(path).absolute()
    stat = path.stat()
    pixels = _decode(path)
    return Picture(
        path=path,
        shape=(1, *pixels.shape),
        dtype=pixels.dtype,
        size_bytes=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
    )


def _decode(path: Path) -> np.ndarray:
    """(height, width) or (height, width, channels), samples as stored. Raises BadImage."""
    try:
        with Image.open(path) as image:
            n_frames = getattr(image, "n_frames", 1)
            # MPO is a phone's JPEG with a preview behind it: its first frame is the picture.
            if n_frames != 1 and image.format != "MPO":
                raise ValueError(f"holds {n_frames} frames; save them as a TIFF stack")
            _refuse_cut_depth(path)
            image.load()
            pixels = np.ascontiguousarray(np.asarray(image))
    except MemoryError:
        raise
    except Image.UnidentifiedImageError:
        raise BadImage(f"image {path} is of no known format; save it as TIFF or PNG") from None
    # Image plugins raise nearly anything on hostile bytes; all of it says one thing about the file.
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise BadImage(f"image {path} cannot be read ({why}); copy it again") from error
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _refuse_cut_depth(path: Path) -> None:
    """Pillow gives the high bytes only of a PNG's 16-bit colours (kind 2 and 6) or grey + alpha."""
    with path.open("rb") as file:
        head = file.read(_PNG_KIND + 1)
    if head.startswith(_PNG) and head[_PNG_BITS] == 16 and head[_PNG_KIND] != 0:
        raise ValueError("its 16-bit channels would be cut to 8 bits; save it as TIFF")
