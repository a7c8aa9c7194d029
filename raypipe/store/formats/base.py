"""What every export format is given and must say.

bfloat16 has no dtype in any of them: its bits go out as uint16, and the format's own metadata says
``dtype: bfloat16``. Rows of invalid images go out as they are, with ``valid`` false beside them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from raypipe.store.layout import FILE_DTYPES, array_bytes

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK_BYTES = 16 << 20


class Block(NamedTuple):
    """Rows from ``lo`` on: values (n, *row_shape), index (n rows of the store's index)."""

    lo: int
    values: np.ndarray
    index: pa.Table


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What is exported. dtype: logical, after widening. facts: plain JSON, for the metadata.

    index: the store's index file. index_bytes: its size when plain.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    facts: dict[str, Any]
    index: Path
    index_bytes: int

    @property
    def rows(self) -> int:
        """Rows in all."""
        return self.shape[0]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one."""
        return self.shape[1:]

    @property
    def numpy_dtype(self) -> np.dtype:
        """What the values are handed out as."""
        return FILE_DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's values."""
        return array_bytes(self.numpy_dtype, self.row_shape)


@dataclass(frozen=True, kw_only=True)
class FormatOptions:
    """chunk_rows: rows a Zarr chunk. shard_bytes: about the size of a shard; None: the format's
    own default, 0 for Zarr: a file a chunk.
    """

    chunk_rows: int = 1
    shard_bytes: int | None = None


class Format(ABC):
    """Writes one export under a temporary name; the caller renames it."""

    #: Whether the export is a folder.
    folder = False

    def __init__(self, contents: Contents, options: FormatOptions) -> None:
        """Raises ConfigError for options that do not fit, or a package that is missing."""
        self.contents = contents
        self.options = options

    @property
    def block_rows(self) -> int:
        """Rows that `write` is given at a time."""
        return max(1, BLOCK_BYTES // self.contents.row_bytes)

    @abstractmethod
    def need_bytes(self) -> int:
        """At most so many bytes will be written."""

    @abstractmethod
    def write(self, target: Path, blocks: Iterator[Block]) -> None:
        """Write all blocks to ``target``, which is not there yet; durably, but for its own name."""

    @classmethod
    def made(cls, path: Path) -> bool:
        """Whether the folder ``path`` was written by this format, so that it may be replaced."""
        return False
