"""One picture: its place in a sorted folder, its bytes' digest, its pixels as RGB.

A picture that cannot be read whole is never patched up: it comes back as ``Undecodable`` with the
reason in one line, so that its row can be kept and marked. Resizing and normalising belong to
``raypipe.backbone.preprocess``.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from PIL import Image

from raypipe.errors import BadImage, MissingInput

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")

# The picture's own fault, or its absence: the row is marked. Other OSErrors (EIO, ESTALE, EMFILE)
# are the machine's fault; they propagate, so that a flaky disk never marks good pictures invalid.
_NOT_THERE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoded:
    """A picture read whole.

    pixels : (height, width, 3) uint8, C-contiguous
    digest : xxh3_128 of the file's bytes, 32 hex digits
    """

    pixels: np.ndarray
    digest: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Undecodable:
    """A picture that cannot be read; ``digest`` is "" when not even its bytes can be."""

    reason: str
    digest: str
    size_bytes: int


def list_images(folder: Path) -> tuple[Path, ...]:
    """The pictures directly in ``folder``, sorted by file name.

    Hidden files (``._x.png`` of macOS) are left out. A dangling link is kept: dropping it would
    shift every row after it. Raises MissingInput when the folder is absent or holds no picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise MissingInput(
            f"image folder {folder} does not exist; give the folder that holds the images"
        )
    with os.scandir(folder) as entries:
        names = sorted(
            entry.name
            for entry in entries
            if not entry.name.startswith(".")
            and entry.name.lower().endswith(IMAGE_SUFFIXES)
            and not entry.is_dir()
        )
    if not names:
        raise MissingInput(
            f"image folder {folder} holds no image ({' '.join(IMAGE_SUFFIXES)}); "
            "give the folder that directly holds the images"
        )
    return tuple(folder / name for name in names)


def read_image(path: Path) -> Decoded:
    """The picture at ``path`` as (height, width, 3) uint8; raises BadImage, with one line why."""
    outcome = try_read_image(path)
    if isinstance(outcome, Undecodable):
        raise BadImage(f"image {path}: {outcome.reason}")
    return outcome


def try_read_image(path: Path) -> Decoded | Undecodable:
    """The picture at ``path``, or why it cannot be read; OSError only for a failing machine."""
    try:
        data = Path(path).read_bytes()
    except _NOT_THERE as error:
        return Undecodable(reason=_one_line(error), digest="", size_bytes=0)
    digest = xxhash.xxh3_128_hexdigest(data)
    try:
        pixels = _pixels(data)
    except MemoryError:
        raise
    # Image plugins raise nearly anything on hostile bytes: SyntaxError, struct.error, zlib.error,
    # TypeError, DecompressionBombError. All of it says one thing about this file.
    except Exception as error:
        return Undecodable(reason=_one_line(error), digest=digest, size_bytes=len(data))
    return Decoded(pixels=pixels, digest=digest, size_bytes=len(data))


def _pixels(data: bytes) -> np.ndarray:
    """(height, width, 3) uint8 of an image file's bytes; raises for all but one whole picture.

    EXIF orientation is not applied: the pixels are taken as stored, as torchvision's and
    open_clip's loaders do, and as PsychoPy and MATLAB's imread showed them to the subject.
    """
    if not data:
        raise ValueError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data))
    except Image.UnidentifiedImageError:
        # Pillow's own text names the BytesIO object, with an address: another text each run.
        raise ValueError("not an image of a known format") from None
    with image:
        n_frames = getattr(image, "n_frames", 1)
        # MPO is a phone's JPEG with a preview behind it: its first frame is the picture.
        if n_frames != 1 and image.format != "MPO":
            raise ValueError(f"holds {n_frames} frames; a row is one image: split it")
        image.load()  # the whole file: PIL's LOAD_TRUNCATED_IMAGES stays False
        return np.ascontiguousarray(np.asarray(_to_rgb(image)))


def _to_rgb(image: Image.Image) -> Image.Image:
    """``image`` in mode RGB, 8 bits a channel, by a rule stated for each mode."""
    mode = image.mode
    if mode == "RGB":
        return image
    if mode.startswith("I;16"):
        # convert("RGB") would clip at 255. The full 16-bit scale maps to the full 8-bit scale, the
        # same for every picture (65535 = 257 * 255): a stretch by each one's own maximum would make
        # brightness incomparable between rows. (16-bit RGB keeps its high byte: Pillow's rule.)
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        raise ValueError(f"mode {mode} has no agreed range of values; save it as 8- or 16-bit")
    if mode in ("P", "PA"):
        # By way of RGBA: a palette whose transparency is a byte string warns on the direct way.
        return image.convert("RGBA").convert("RGB")
    # Alpha is dropped, not blended: what torchvision's, timm's and open_clip's own loaders feed.
    return image.convert("RGB")


def _one_line(error: BaseException) -> str:
    """``error`` as one short line; an OSError without its path, which the row's name tells."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(text.split()) or "no reason given"
    return f"{type(error).__name__}: {text}"[:200]


def first_size(paths: Iterable[Path]) -> tuple[int, int]:
    """Height and width in pixels of the first image that can be read. Raises BadImage when none
    can be.
    """
    reason = "no images"
    for path in paths:
        try:
            height, width, _ = read_image(path).pixels.shape
        except BadImage as error:
            reason = str(error)
            continue
        return height, width
    raise BadImage(f"not one image can be read; the last: {reason}")
