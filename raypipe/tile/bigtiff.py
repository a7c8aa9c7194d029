"""The bytes of a tiled, uncompressed BigTIFF before its pixels: where each tile will lie is plain
arithmetic, so that many processes can write tiles of one preallocated file with pwrite. Pure.

Layout: header, descriptions, one IFD a page with its tables of offsets and byte counts, then all tiles,
page by page in row order. Tiles at the right and the lower end are filled up with zeros.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from xml.sax.saxutils import quoteattr

import numpy as np

from raypipe.errors import ConfigError

_ALIGN = 4096  # data begins at a page of the disk
_FORMATS = {"u": 1, "i": 2, "f": 3, "b": 1}
_OME = {"float32": "float", "float64": "double"}
_OME_TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64")
_SHORT, _LONG, _LONG8, _ASCII = 3, 4, 16, 2
_PACK = {_SHORT: "<u2", _LONG: "<u4", _LONG8: "<u8"}


@dataclass(frozen=True, kw_only=True)
class BigTiff:
    """``shape`` (frames, channels, planes, rows, cols) as frames*channels*planes pages.

    tile : pixels, a multiple of 16; axes : of ``described``, the shape that readers are told
    """

    shape: tuple[int, int, int, int, int]
    dtype: np.dtype[Any]
    tile: int
    described: tuple[int, ...]
    ome: bool = False
    name: str = "image"

    def __post_init__(self) -> None:
        if self.tile < 16 or self.tile % 16:
            raise ConfigError(f"TIFF tiles of {self.tile} pixels: TIFF wants a multiple of 16")
        if self.dtype.kind not in _FORMATS or self.dtype.itemsize > 8:
            raise ConfigError(f"dtype {self.dtype} cannot be written as TIFF; choose .npy")
        if self.ome and self.dtype.name not in _OME_TYPES:
            raise ConfigError(
                f"OME-TIFF has no dtype {self.dtype}; take one of {', '.join(_OME_TYPES)}, or a name "
                "that ends in .tif"
            )

    @property
    def pages(self) -> int:
        """Number of IFDs."""
        return int(np.prod(self.shape[:3]))

    @property
    def counts(self) -> tuple[int, int]:
        """Tiles (down, across)."""
        return -(-self.shape[3] // self.tile), -(-self.shape[4] // self.tile)

    @property
    def tile_bytes(self) -> int:
        """Of one tile."""
        return self.tile * self.tile * self.dtype.itemsize

    @cached_property
    def data_offset(self) -> int:
        """Where the first tile lies."""
        end = 16 + self._description_room + self.pages * self._ifd_room
        return -(-end // _ALIGN) * _ALIGN

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        return self.data_offset + self.pages * self.counts[0] * self.counts[1] * self.tile_bytes

    def offset(self, page: int, row: int, col: int) -> int:
        """Where the tile in ``row``, ``col`` (of tiles) of ``page`` lies."""
        down, across = self.counts
        return self.data_offset + ((page * down + row) * across + col) * self.tile_bytes

    @cached_property
    def description(self) -> bytes:
        """OME-XML, or the shape as tifffile writes and reads it; ends in a zero byte."""
        text = _ome_xml(self) if self.ome else json.dumps({"shape": list(self.described)})
        return text.encode() + b"\0"

    @property
    def _description_room(self) -> int:
        return -(-len(self.description) // 8) * 8

    @property
    def _ifd_room(self) -> int:
        """Bytes of one IFD and its two tables."""
        tiles = self.counts[0] * self.counts[1]
        return 8 + 20 * len(self._tags(0)) + 8 + (16 * tiles if tiles > 1 else 0)

    def header(self) -> bytes:
        """Everything before ``data_offset``. Some 16 bytes a tile."""
        first = 16 + self._description_room
        parts = [struct.pack("<2sHHHQ", b"II", 43, 8, 0, first), self.description]
        parts.append(b"\0" * (self._description_room - len(self.description)))
        parts += [self._ifd(page, first + page * self._ifd_room) for page in range(self.pages)]
        head = b"".join(parts)
        return head + b"\0" * (self.data_offset - len(head))

    def _tags(self, page: int) -> list[tuple[int, int, Any]]:
        """(tag, type, value) in order; tables and text stand in for their values."""
        bits = 8 * self.dtype.itemsize
        tags: list[tuple[int, int, Any]] = [
            (254, _LONG, 0),
            (256, _LONG, self.shape[4]),
            (257, _LONG, self.shape[3]),
            (258, _SHORT, bits),
            (259, _SHORT, 1),  # not compressed
            (262, _SHORT, 1),  # black is zero
            (277, _SHORT, 1),
            (284, _SHORT, 1),
            (322, _LONG, self.tile),
            (323, _LONG, self.tile),
            (324, _LONG8, "offsets"),
            (325, _LONG8, "counts"),
            (339, _SHORT, _FORMATS[self.dtype.kind]),
        ]
        if page == 0:
            tags.insert(6, (270, _ASCII, "description"))
        return tags

    def _ifd(self, page: int, at: int) -> bytes:
        down, across = self.counts
        tiles, tags = down * across, self._tags(page)
        tables = at + 8 + 20 * len(self._tags(0)) + 8
        entries = []
        for tag, kind, value in tags:
            count, field = 1, value
            if value == "description":
                count, field = len(self.description), 16
            elif value == "offsets":
                count, field = tiles, tables if tiles > 1 else self.offset(page, 0, 0)
            elif value == "counts":
                count, field = tiles, tables + 8 * tiles if tiles > 1 else self.tile_bytes
            inline = np.array(field, _PACK[kind] if count == 1 else "<u8").tobytes().ljust(8, b"\0")
            entries.append(struct.pack("<HHQ", tag, kind, count) + inline)
        after = at + self._ifd_room if page + 1 < self.pages else 0
        ifd = struct.pack("<Q", len(tags)) + b"".join(entries) + struct.pack("<Q", after)
        ifd = ifd.ljust(tables - at, b"\0")
        if tiles > 1:
            offsets = self.offset(page, 0, 0) + np.arange(tiles, dtype="<u8") * self.tile_bytes
            ifd += (
                offsets.astype("<u8").tobytes() + np.full(tiles, self.tile_bytes, "<u8").tobytes()
            )
        return ifd


def _ome_xml(tiff: BigTiff) -> str:
    """Pages run through planes first, then channels, then frames."""
    frames, channels, planes, rows, cols = tiff.shape
    kind = _OME.get(tiff.dtype.name, tiff.dtype.name)
    marks = "".join(f'<Channel ID="Channel:0:{k}" SamplesPerPixel="1"/>' for k in range(channels))
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">'
        f'<Image ID="Image:0" Name={quoteattr(tiff.name)}>'
        f'<Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="{kind}" BigEndian="false" '
        f'SizeX="{cols}" SizeY="{rows}" SizeZ="{planes}" SizeC="{channels}" SizeT="{frames}">'
        f"{marks}<TiffData/></Pixels></Image></OME>"
    )
