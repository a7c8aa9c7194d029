"""Where an array of rows lies on disk: a small picklable handle (path, dtype, shape, offset).

It travels to workers instead of bytes and is mapped where it lands, by `raypipe.stream.mapped`.
`as_source` makes one of whatever a user names rows by. Batches of rows are
`raypipe.stream.gather`'s; a store's manifest is `raypipe.store`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from raypipe.errors import ConfigError, MissingInput, StoreCorrupt, StoreError

if TYPE_CHECKING:
    from raypipe.store import FeatureStore, StoreLocator
    from raypipe.stream.mapped import MappedRows
    from raypipe.stream.reading import Source

# bfloat16 has no numpy dtype: stores hold its bits as uint16 and say so.
_STORED_AS = {"bfloat16": "uint16"}
LOGICAL_DTYPES = (
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
        if self.dtype not in LOGICAL_DTYPES:
            raise ConfigError(
                f"{self.path} holds {self.dtype}; a training source is one of {', '.join(LOGICAL_DTYPES)}"
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
        from raypipe.stream.mapped import MappedRows

        return MappedRows(self)


def as_source(given: Source | FeatureStore | Path | str) -> Source:
    """The source that ``given`` names: itself, a sealed store's, or that of a ``.npy``.

    A ``.npy`` with a manifest beside it is read as that store (so that bfloat16 is seen as such); one
    whose catalog says that it lies on nodes' disks, as what the catalog says. Raises as
    `ArraySource.npy`, `FeatureStore.open` and `read_catalog`.
    """
    if isinstance(given, (str, Path)) and not _has_manifest(Path(given)):
        placed = _placed(Path(given))
        return ArraySource.of_locator(placed) if placed else ArraySource.npy(given)
    store = store_of(given)
    return ArraySource.of_locator(store.locator()) if store else cast("Source", given)


def store_of(given: Source | FeatureStore | Path | str) -> FeatureStore | None:
    """The sealed store that ``given`` is or names; None for a file or source without a manifest.

    Of one that lies on nodes' disks it is this node's copy. Raises StoreError when it has none, and
    as `FeatureStore.open`.
    """
    from raypipe.store import FeatureStore, locate

    if isinstance(given, FeatureStore):
        return given
    if not isinstance(given, (str, Path)):
        return None
    path = Path(given)
    if _has_manifest(path):
        return FeatureStore.open(path)
    return FeatureStore.open(locate(path).path) if _placed(path) else None


def _has_manifest(path: Path) -> bool:
    return path.with_name(f"{path.stem}.manifest.json").exists()


def _placed(path: Path) -> StoreLocator | None:
    """What the catalog says of a store that lies nowhere but on nodes' disks."""
    from raypipe.store.catalog import read_catalog

    catalog = read_catalog(path) if path.suffix == ".npy" and path.stem else None
    return catalog.contents if catalog else None


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
