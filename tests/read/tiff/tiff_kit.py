"""TIFF files of every kind that the field's programs write, small, by tifffile; one by hand."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile

SHAPE = (5, 37, 53)


def values(shape=SHAPE, dtype="u2", seed=0) -> np.ndarray:
    """Values of ``shape``, smooth enough to be compressed."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        return rng.normal(0, 50, shape).astype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    info = np.iinfo(dtype)
    steps = rng.integers(-2, 3, shape, dtype=np.int64).cumsum(axis=-1)
    return (steps * (info.max // 3000 or 1) + info.min).astype(dtype)


def write(name="a.tif", **options) -> Callable[[Path, np.ndarray], Path]:
    """A writer by tifffile.imwrite."""

    options.setdefault("photometric", "minisblack")

    def writing(folder: Path, array: np.ndarray) -> Path:
        tifffile.imwrite(folder / name, array, **options)
        return folder / name

    return writing


def apart(folder: Path, array: np.ndarray) -> Path:
    """Plain pages, each behind its directory, without metadata of a stack; unlike descriptions."""
    with tifffile.TiffWriter(folder / "a.tif") as tif:
        for k, page in enumerate(array):
            text = f"page {k}" * (k + 1)
            tif.write(page, contiguous=False, metadata=None, description=text)
    return folder / "a.tif"


def spaced(folder: Path, array: np.ndarray) -> Path:
    """Plain pages at even distances, without metadata: as libtiff's programs write them."""
    return write_pages(folder / "a.tif", array)


def write_pages(path: Path, array: np.ndarray) -> Path:
    """Classic TIFF by hand: header, then directory and values of each page of (n, y, x) uint16."""
    n, height, width = array.shape
    tags = 8
    block = 2 + 12 * tags + 4
    with path.open("wb") as file:
        file.write(b"II*\0" + struct.pack("<I", 8))
        for k, page in enumerate(array.astype("<u2")):
            at = file.tell()
            after = at + block + page.nbytes if k + 1 < n else 0
            file.write(directory(width, height, at + block, page.nbytes, after))
            file.write(page.tobytes())
    return path


def directory(width, height, start, n_bytes, after, description=b"") -> bytes:
    """A little-endian classic directory of one plain uint16 strip."""
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 16), (259, 3, 1, 1)]
    entries += [(262, 3, 1, 1), (273, 4, 1, start), (278, 4, 1, height), (279, 4, 1, n_bytes)]
    if description:
        entries.insert(5, (270, 2, *description))
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return struct.pack("<H", len(entries)) + packed + struct.pack("<I", after)


def big_imagej(path: Path, n: int, height: int, width: int, frames: dict[int, np.ndarray]) -> Path:
    """An ImageJ hyperstack above 4 GB: one directory, values big-endian behind it, holes between.

    frames : the frames that are not zero
    """
    text = f"ImageJ=1.53t\nimages={n}\nslices={n // 2}\nframes=2\nhyperstack=true\n\0".encode()
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 16 << 16), (259, 3, 1, 1 << 16)]
    start = 8 + 2 + 12 * 10 + 4 + len(text)
    entries += [(262, 3, 1, 1 << 16), (270, 2, len(text), start - len(text)), (273, 4, 1, start)]
    entries += [(277, 3, 1, 1 << 16), (278, 4, 1, height), (279, 4, 1, height * width * 2)]
    with path.open("wb") as file:
        file.write(b"MM\0*" + struct.pack(">I", 8) + struct.pack(">H", len(entries)))
        for entry in entries:
            file.write(struct.pack(">HHII", *entry))
        file.write(struct.pack(">I", 0) + text)
        assert file.tell() == start
        file.truncate(start + n * height * width * 2)
        for k, frame in frames.items():
            file.seek(start + k * height * width * 2)
            file.write(frame.astype(">u2").tobytes())
    return path


@dataclass(frozen=True)
class Kind:
    """A kind of file: its writer, what is put into it, and how it should be read."""

    write: Callable[[Path, np.ndarray], Path]
    way: str
    shape: tuple[int, ...] = SHAPE
    dtype: str = "u2"


def _kind(way, shape=SHAPE, dtype="u2", **options):
    return Kind(write(**options), way, shape, dtype)


RGB = (4, 37, 53, 3)
KINDS = {
    "contiguous": _kind("map"),
    "one page": _kind("map", (37, 53)),
    "deflate": _kind("pages", compression="deflate", rowsperstrip=8),
    "deflate, one strip": _kind("pages", compression="deflate"),
    "LZW": _kind("pages", compression="lzw", rowsperstrip=8),
    "LZW with predictor": _kind("pages", compression="lzw", predictor=True, rowsperstrip=7),
    "zstd": _kind("pages", compression="zstd"),
    "packbits": _kind("pages", (5, 37, 53), "u1", compression="packbits"),
    "JPEG": _kind("pages", RGB, "u1", compression="jpeg", photometric="rgb", tile=(16, 32)),
    "tiled": _kind("pages", tile=(16, 32)),
    "tiled, deflate": _kind("pages", tile=(16, 32), compression="deflate"),
    "tiled volume": _kind("pages", (5, 37, 53), tile=(2, 16, 32), compression="deflate"),
    "strips": _kind("map", rowsperstrip=5),
    "pages apart": Kind(apart, "map"),
    "pages evenly apart": Kind(spaced, "map", (40, 9, 11)),
    "pages, deflate": _kind("pages", (9, 37, 53), compression="deflate", metadata=None),
    "few pages, deflate": _kind("pages", (5, 37, 53), compression="deflate", metadata=None),
    "BigTIFF": _kind("map", bigtiff=True),
    "BigTIFF, deflate": _kind("pages", bigtiff=True, compression="deflate"),
    "OME": _kind("map", (2, 3, 4, 17, 19), name="a.ome.tif", metadata={"axes": "TZCYX"}),
    "OME, deflate": _kind("pages", (2, 3, 4, 17, 19), name="a.ome.tif", compression="deflate"),
    "OME, RGB": _kind("map", RGB, "u1", name="a.ome.tif", photometric="rgb"),
    "ImageJ": _kind("map", (2, 3, 4, 17, 19), imagej=True, metadata={"axes": "TZCYX"}),
    "ImageJ, RGB": _kind("map", (2, 17, 19, 3), "u1", imagej=True, photometric="rgb"),
    "big-endian": _kind("map", byteorder=">"),
    "big-endian, deflate": _kind("pages", byteorder=">", compression="deflate"),
    "big-endian, tiled": _kind("pages", byteorder=">", bigtiff=True, tile=(16, 16)),
    "RGB": _kind("map", RGB, "u1", photometric="rgb"),
    "RGB, 16 bits, deflate": _kind("pages", RGB, photometric="rgb", compression="deflate"),
    "RGB in planes": _kind("map", (4, 3, 37, 53), photometric="rgb", planarconfig="separate"),
    "RGB in planes, tiled": _kind(
        "pages", (4, 3, 37, 53), photometric="rgb", planarconfig="separate", tile=(16, 16)
    ),
    "a last axis of one": _kind("map", (5, 37, 53, 1)),
    "8 bits": _kind("map", dtype="u1"),
    "signed": _kind("map", dtype="i2"),
    "32 bits": _kind("map", dtype="u4"),
    "float32": _kind("map", dtype="f4"),
    "float32, deflate": _kind("pages", dtype="f4", compression="deflate", predictor=True),
    "float64": _kind("map", dtype="f8"),
    "float16": _kind("map", dtype="f2"),
    "1 bit": _kind("pages", dtype="?", compression="packbits"),
    "wide": _kind("map", (3, 40, 9001)),
}
