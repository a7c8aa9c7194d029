"""Where an array of rows lies on disk, and the read-only map of it in one process.

An `ArraySource` is a small picklable handle (path, dtype, shape, offset): it travels to workers
instead of bytes and is mapped where it lands. Touching a map beyond the end of a file that was cut
short is SIGBUS; so the size is checked when the file is mapped and again before every gather (what
is cut off during a gather, or fails on the disk itself, still is one).

Batches of rows are `raypipe.stream.gather`'s; a store's manifest is `raypipe.store`'s.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from raypipe.errors import ConfigError, MissingInput, StoreCorrupt, StoreError
from raypipe.memory.guard import on_relief

# bfloat16 has no numpy dtype: stores hold its bits as uint16 and say so.
_STORED_AS = {"bfloat16": "uint16"}
_LOGICAL = (
    *("float16", "bfloat16", "float32", "float64"),
    *("bool", "uint8", "int8", "int16", "uint16", "int32", "int64"),
)


class Locator(Protocol):
    """What is read of a `raypipe.store` StoreLocator."""

    @property
    def path(self) -> str | Path: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def offset(self) -> int: ...
    @property
    def node(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class ArraySource:
    """Rows in a file: ``shape`` (n_rows, *row_shape) of ``dtype`` from byte ``offset`` on, C order.

    ``dtype`` is the logical one: ``bfloat16`` is stored as uint16. ``node`` and ``fingerprint`` are
    carried along for who placed and who made the file. Raises ConfigError for what torch cannot
    take.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    node: str = ""
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in _LOGICAL:
            raise ConfigError(
                f"{self.path} holds {self.dtype}; a training source is one of {', '.join(_LOGICAL)}"
                ", little-endian"
            )
        if not self.shape or min(self.shape) < 1 or self.offset < 0:
            raise ConfigError(
                f"{self.path}: shape {self.shape} at byte {self.offset}; a source has at least one "
                "row and no empty axis"
            )

    @classmethod
    def npy(cls, path: Path | str, *, dtype: str | None = None) -> ArraySource:
        """The source that a ``.npy`` file is; ``dtype="bfloat16"`` reads its uint16 as bfloat16.

        Raises MissingInput without the file, StoreCorrupt when it is shorter than its header says
        or no ``.npy``, StoreError when its rows are not contiguous (Fortran order), ConfigError for
        a dtype that torch cannot take.
        """
        array = _open_npy(Path(path))
        if not array.flags.c_contiguous:
            raise StoreError(f"{path} is in Fortran order; save it again in C order to read rows")
        stored = array.dtype.str if array.dtype.byteorder == ">" else array.dtype.name
        if dtype is not None and _STORED_AS.get(dtype, dtype) != stored:
            raise ConfigError(f"{path} holds {stored}; it cannot be read as {dtype}")
        return cls(
            path=Path(path), dtype=dtype or stored, shape=array.shape, offset=int(array.offset)
        )

    @classmethod
    def of_locator(cls, locator: Locator) -> ArraySource:
        """The source that a store's locator names."""
        return cls(
            path=Path(locator.path),
            dtype=str(locator.dtype),
            shape=tuple(int(n) for n in locator.shape),
            offset=int(locator.offset),
            node=locator.node,
            fingerprint=locator.fingerprint,
        )

    @property
    def n_rows(self) -> int:
        """Rows in the file."""
        return self.shape[0]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.shape[1:]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row on disk, and in a batch."""
        return math.prod(self.row_shape) * self.stored_dtype.itemsize

    @property
    def stored_dtype(self) -> np.dtype:
        """The numpy dtype of the bytes on disk."""
        return np.dtype(_STORED_AS.get(self.dtype, self.dtype))

    @property
    def end_byte(self) -> int:
        """First byte after the rows; a smaller file is truncated."""
        return self.offset + self.n_rows * self.row_bytes

    def open(self) -> MappedRows:
        """Map the file for reading. Raises MissingInput, StoreCorrupt (truncated)."""
        return MappedRows(self)


class MappedRows:
    """A read-only map of one source; `take` copies rows out of it, without holding the GIL."""

    def __init__(self, source: ArraySource) -> None:
        self.source = source
        try:
            with source.path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise MissingInput(f"{source.path} is not there; extract or copy it first") from error
        except ValueError as error:  # an empty file cannot be mapped
            raise StoreCorrupt(_truncated(source, 0)) from error
        self._check_size()
        count = source.n_rows * source.row_bytes
        flat = np.frombuffer(self._map, np.uint8, count, source.offset)
        # As bytes: one path for all dtypes, and np.take copies a misaligned array whole.
        self._bytes = flat.reshape(source.n_rows, source.row_bytes)
        on_relief(self)

    @property
    def array(self) -> np.ndarray:
        """The rows, (n_rows, *row_shape) of the stored dtype, read-only, not copied."""
        return self._bytes.view(self.source.stored_dtype).reshape(self.source.shape)

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy ``rows`` (n,) into ``out`` (n, row_bytes) uint8.

        Raises ConfigError for a row that the file does not have, StoreCorrupt when the file was cut
        short since it was mapped.
        """
        rows = np.asarray(rows, dtype=np.intp)
        if rows.size == 0:
            return
        if rows.min() < 0 or rows.max() >= self.source.n_rows:
            raise ConfigError(
                f"rows {rows.min()}..{rows.max()} asked of {self.source.path}, which has "
                f"{self.source.n_rows}; was the split made for another store?"
            )
        self._check_size()
        # The range is checked above: mode "raise" would copy through a second buffer.
        np.take(self._bytes, rows, axis=0, out=out, mode="clip")

    def give_back(self) -> None:
        """Let go of the pages that this process has touched; they are read again when needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _check_size(self) -> None:
        if self._map.size() < self.source.end_byte:
            raise StoreCorrupt(_truncated(self.source, self._map.size()))


def _open_npy(path: Path) -> np.memmap:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise MissingInput(f"{path} is not there; extract or copy it first") from error
    except (ValueError, EOFError, OSError) as error:
        raise StoreCorrupt(
            f"{path} cannot be mapped as .npy ({error}); extract or copy it again"
        ) from error
    if not isinstance(array, np.memmap) or array.ndim < 1:
        raise StoreError(f"{path} is not a .npy array of rows; give one array with a row axis")
    return array


def _truncated(source: ArraySource, size: int) -> str:
    return (
        f"{source.path} holds {size} bytes, its {source.n_rows} rows need {source.end_byte}; "
        "it was cut short: extract or copy it again"
    )
