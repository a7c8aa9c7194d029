"""Files that say in their own ways where channels lie, each with a mask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

H, W = 40, 56


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(1, 900, shape).astype(np.uint16)


def ome(path: Path, pixels: np.ndarray, axes: str, **options: Any) -> None:
    tifffile.imwrite(path, pixels, ome=True, metadata={"axes": axes}, **options)


def imagej(path: Path, pixels: np.ndarray, axes: str) -> None:
    tifffile.imwrite(path, pixels, imagej=True, metadata={"axes": axes})


def plain(path: Path, pixels: np.ndarray, axes: str, **options: Any) -> None:
    tifffile.imwrite(path, pixels, photometric="minisblack", metadata=None, **options)


def colour(path: Path, pixels: np.ndarray, axes: str) -> None:
    tifffile.imwrite(path, np.moveaxis(pixels, 0, -1), photometric="rgb", metadata=None)


def planar(path: Path, pixels: np.ndarray, axes: str) -> None:
    tifffile.imwrite(
        path, pixels, photometric="rgb", planarconfig="separate", metadata=None
    )  # fmt: skip


def rgb(path: Path, pixels: np.ndarray, axes: str) -> None:
    ome(path, pixels.astype(np.uint8), axes, photometric="rgb")


def as_planes(path: Path, pixels: np.ndarray, axes: str) -> None:
    """Channels that the file calls Z, as many save them."""
    imagej(path, pixels, "ZYX")


def pair(folder: Path, write: Callable[..., None], pixels: np.ndarray, axes: str, n: int) -> Path:
    """One image with a mask of ``n`` pages."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    write(folder / "images/a.tif", pixels, axes)
    mask = noise(n, H, W) % 2
    tifffile.imwrite(folder / "masks/a.tif", mask[0] if n == 1 else mask, photometric="minisblack")
    return folder


def png(path: Path, pixels: np.ndarray, axes: str) -> None:
    Image.fromarray(np.moveaxis(pixels, 0, -1).astype(np.uint8)).save(path, "PNG")
