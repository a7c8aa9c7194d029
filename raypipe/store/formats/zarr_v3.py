"""Zarr v3: a group with ``features`` and, beside it, ``valid``, ``name``, ``digest``, ``reason``.

A chunk is ``chunk_rows`` rows; chunks are packed into shard files (``sharding_indexed``), so that
ten million rows are not ten million files. Texts are (rows, longest) uint8, UTF-8 padded with
zeros: Zarr v3 has no stable string type. Nothing is compressed: float noise hardly shrinks, and a
row is then one read. Attributes of the group, key ``raypipe``: dtype (bfloat16 is uint16 in the
array), fingerprint, identity.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.errors import ConfigError
from raypipe.store.blocks import IndexCursor
from raypipe.store.durable import fsync_dir
from raypipe.store.formats.base import Block, Contents, Format, FormatOptions

_SHARD_BYTES = 64 << 20  # held in memory about three times while it is written
_TEXTS = ("name", "digest", "reason")
_TEXT_ROWS = 1 << 16
_FILE = 4096  # what a small file takes on most disks


class ZarrFormat(Format):
    """Read with ``zarr.open_group(path, mode="r")["features"][rows]``."""

    folder = True

    def __init__(self, contents: Contents, options: FormatOptions) -> None:
        super().__init__(contents, options)
        self._zarr = _zarr_package()
        if options.chunk_rows < 1:
            raise ConfigError(f"--chunk-rows {options.chunk_rows} is below 1; a chunk has rows")
        size = _SHARD_BYTES if options.shard_bytes is None else options.shard_bytes
        self.chunk_rows = min(options.chunk_rows, contents.rows)
        chunks = max(1, size // (self.chunk_rows * contents.row_bytes))
        self.shard_rows = min(chunks, -(-contents.rows // self.chunk_rows)) * self.chunk_rows
        self.sharded = size > 0

    @property
    def block_rows(self) -> int:
        """Whole shards: one that is written twice is read back in between."""
        return self.shard_rows

    def need_bytes(self) -> int:
        """Values, shard indexes, texts padded to the longest, a file's own block."""
        contents = self.contents
        chunks = -(-contents.rows // self.chunk_rows)
        files = -(-contents.rows // self.shard_rows) if self.sharded else chunks
        padded = chunks * self.chunk_rows * contents.row_bytes
        texts = sum(self._longest().values()) + 1
        rows = -(-contents.rows // _TEXT_ROWS) * _TEXT_ROWS if contents.rows else 0
        small = 32 * _FILE + 4 * (rows // _TEXT_ROWS) * _FILE
        return padded + 16 * chunks + files * (_FILE + 4) + rows * texts + small

    def _longest(self) -> dict[str, int]:
        cursor = IndexCursor(self.contents.index)
        try:
            return {name: max(1, cursor.longest(name)) for name in _TEXTS}
        finally:
            cursor.close()

    def write(self, target: Path, blocks: Iterator[Block]) -> None:
        """Shard after shard, then every file is made durable."""
        contents, longest = self.contents, self._longest()
        group = self._zarr.open_group(
            str(target), mode="w-", zarr_format=3, attributes={"raypipe": contents.facts}
        )
        features = group.create_array(
            "features",
            shape=contents.shape,
            chunks=(self.chunk_rows, *contents.row_shape),
            shards=(self.shard_rows, *contents.row_shape) if self.sharded else None,
            dtype=contents.numpy_dtype,
            compressors=None,
            fill_value=0,
            # A chunk equal to the fill value would be left out, and -0.0 come back as 0.0.
            config={"write_empty_chunks": True},
        )
        for block in blocks:
            features[block.lo : block.lo + len(block.values)] = block.values
        self._write_index(group, longest)
        _settle(target)

    def _write_index(self, group: Any, longest: dict[str, int]) -> None:
        rows = self.contents.rows
        chunk = min(rows, _TEXT_ROWS)
        valid = group.create_array("valid", shape=(rows,), chunks=(chunk,), dtype="bool")
        texts = {
            name: group.create_array(
                name, shape=(rows, width), chunks=(chunk, width), dtype="uint8", compressors=None
            )
            for name, width in longest.items()
        }
        cursor = IndexCursor(self.contents.index)
        try:
            for lo in range(0, rows, _TEXT_ROWS):
                part = cursor.take(min(_TEXT_ROWS, rows - lo))
                hi = lo + part.num_rows
                valid[lo:hi] = part.column("valid").to_numpy()
                for name, array in texts.items():
                    encoded = [(text or "").encode() for text in part.column(name).to_pylist()]
                    padded = np.array(encoded, f"S{longest[name]}")
                    array[lo:hi] = padded.view("u1").reshape(part.num_rows, longest[name])
        finally:
            cursor.close()

    @classmethod
    def made(cls, path: Path) -> bool:
        """The group has our attributes."""
        try:
            return "raypipe" in json.loads((path / "zarr.json").read_bytes())["attributes"]
        except (OSError, ValueError, KeyError, TypeError):
            return False


def _zarr_package() -> Any:
    try:
        zarr = importlib.import_module("zarr")
    except ImportError:
        raise ConfigError("zarr is not installed; pip install 'raypipe[export]'") from None
    if int(zarr.__version__.partition(".")[0]) < 3:
        raise ConfigError(f"zarr is {zarr.__version__}, 3 is needed; pip install 'raypipe[export]'")
    return zarr


def _settle(folder: Path) -> None:
    """Make all below ``folder`` survive a power cut."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            fd = os.open(Path(place) / name, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        fsync_dir(Path(place))
