"""A PNG, JPEG or other picture as one frame, its samples as they are stored.

Unlike ``images``, which makes RGB of 8 bits for backbones, nothing is converted here: 16-bit grey
stays so, a palette's picture gives its indices (label masks are kept that way), alpha is a channel.
The file is compressed as a whole, so a part of it costs the whole: what was read last, of all
pictures together, is kept up to ``kept.KEEP_BYTES``. A picture above that would be decoded again for
every part of it, and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raypipe.errors import BadImage, ConfigError, InputError
from raypipe.read.tiff.kept import KEEP_BYTES, kept_pictures
from raypipe.read.tiff.span import span
from raypipe.units import format_bytes

_PNG = b"\x89PNG\r\n\x1a\n"
# Where a PNG says how many bits a sample has, and which kind of samples.
_PNG_BITS, _PNG_KIND = 24, 25
# Bytes a value of Pillow's modes; 1 of all others.
_MODE_BYTES = {"I;16": 2, "I;16B": 2, "I;16L": 2, "I": 4, "F": 4}
_REMEDY = "save it as a tiled TIFF, which is read by parts"


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
        self._check_unchanged()
        found = kept_pictures.get(self._key)
        if found is not None:
            return found
        pixels = _decode(self.path)
        if pixels.shape != self.shape[1:] or pixels.dtype != self.dtype:
            raise InputError(f"image {self.path} was changed while in use; run again")
        self._keep(pixels)
        return pixels

    @property
    def _key(self) -> tuple[str, int, int]:
        return str(self.path), self.size_bytes, self.mtime_ns

    def _keep(self, pixels: np.ndarray) -> None:
        kept_pictures.put(self._key, pixels, KEEP_BYTES)

    def _check_unchanged(self) -> None:
        try:
            stat = self.path.stat()
        except OSError as error:
            raise InputError(f"image {self.path} cannot be read ({error.strerror})") from error
        if (stat.st_size, stat.st_mtime_ns) != (self.size_bytes, self.mtime_ns):
            raise InputError(f"image {self.path} was changed while in use; run again")


def open_picture(path: Path) -> Picture:
    """The picture at ``path``, which is read once, to know that it can be. Raises BadImage, InputError
    (larger than what is kept).
    """
    path = Path(path).absolute()
    stat = path.stat()
    pixels = _decode(path)
    found = Picture(
        path=path,
        shape=(1, *pixels.shape),
        dtype=pixels.dtype,
        size_bytes=stat.st_size,
        mtime_ns=stat.st_mtime_ns,
    )
    found._keep(pixels)
    return found


def _decode(path: Path) -> np.ndarray:
    """(height, width) or (height, width, channels), samples as stored. Raises BadImage."""
    try:
        with Image.open(path) as image:
            n_frames = getattr(image, "n_frames", 1)
            # MPO is a phone's JPEG with a preview behind it: its first frame is the picture.
            if n_frames != 1 and image.format != "MPO":
                raise ValueError(f"holds {n_frames} frames; save them as a TIFF stack")
            _refuse_cut_depth(path)
            _refuse_large(path, image)
            image.load()
            pixels = np.ascontiguousarray(np.asarray(image))
    except (MemoryError, InputError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"image {path} is too large ({error}); {_REMEDY}") from error
    except Image.UnidentifiedImageError:
        raise BadImage(f"image {path} is of no known format; save it as TIFF or PNG") from None
    # Image plugins raise nearly anything on hostile bytes; all of it says one thing about the file.
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise BadImage(f"image {path} cannot be read ({why}); copy it again") from error
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _refuse_large(path: Path, image: Image.Image) -> None:
    values = image.width * image.height * len(image.getbands())
    n_bytes = values * _MODE_BYTES.get(image.mode, 1)
    if n_bytes > KEEP_BYTES:
        raise InputError(
            f"image {path} has {image.width} x {image.height} pixels ({format_bytes(n_bytes)}), and every "
            f"part of it costs the whole: {format_bytes(KEEP_BYTES)} are the most; {_REMEDY}"
        )


def _refuse_cut_depth(path: Path) -> None:
    """Pillow gives the high bytes only of a PNG's 16-bit colours (kind 2 and 6) or grey + alpha."""
    with path.open("rb") as file:
        head = file.read(_PNG_KIND + 1)
    if head.startswith(_PNG) and head[_PNG_BITS] == 16 and head[_PNG_KIND] != 0:
        raise ValueError("its 16-bit channels would be cut to 8 bits; save it as TIFF")
