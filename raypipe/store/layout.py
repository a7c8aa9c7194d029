"""Where a shard's bytes lie: the files beside it, its ``.npy`` header, its grid of cells. Pure.

For a shard ``train.npy`` the folder holds::

    train.npy.partial     while it is written: a valid .npy from the start, renamed when sealed
    train.npy             once sealed; whoever finds this name finds a finished file
    train.manifest.json   what it is (`manifest`)
    train.index.parquet   row -> source file, digest, valid flag (`index`)
    train.journal/        commit records, one file a writer, and the fence (`journal`, `fence`)
    train.lock            held by the run that writes it; train.owner.json says who (`lock`)
    train.places.json     where its copies lie, once there are any (`catalog`)
    train.places.parquet  beside the catalog of a store that lies on nodes' disks: its rows (`placed`)

A sealed shard keeps the .npy, the manifest, the index and the places only.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from raypipe.errors import ConfigError, StoreCorrupt

#: Name -> dtype in the file. NumPy has no bfloat16: its bits are kept as uint16, and the manifest
#: says so. raypipe writes the first three; the others are met in files that were adopted.
FILE_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float64": np.dtype("<f8"),
    "bool": np.dtype("?"),
    **{name: np.dtype(name).newbyteorder("<") for name in ("uint8", "int8", "int16", "uint16")},
    **{name: np.dtype(name).newbyteorder("<") for name in ("int32", "int64")},
}
WRITTEN_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class ShardPaths:
    """The names that belong to one shard."""

    final: Path
    partial: Path
    manifest: Path
    index: Path
    journal: Path
    lock: Path
    owner: Path
    places: Path

    @classmethod
    def of(cls, path: Path) -> ShardPaths:
        """Names beside the shard ``path``; ConfigError unless it ends in ``.npy``."""
        if path.suffix != ".npy" or not path.stem:
            raise ConfigError(f"shard {path} does not end in .npy; name it like train.npy")
        folder, stem = path.parent, path.stem
        return cls(
            final=path,
            partial=folder / f"{path.name}.partial",
            manifest=folder / f"{stem}.manifest.json",
            index=folder / f"{stem}.index.parquet",
            journal=folder / f"{stem}.journal",
            lock=folder / f"{stem}.lock",
            owner=folder / f"{stem}.owner.json",
            places=folder / f"{stem}.places.json",
        )

    @property
    def folder(self) -> Path:
        """The folder of all of them."""
        return self.final.parent

    @property
    def fence(self) -> Path:
        """The file that says which writers may still write (`fence`)."""
        return self.journal / "fence"

    def journals(self) -> list[Path]:
        """Journal files that are there, oldest epoch first."""
        return sorted(self.journal.glob("*.jsonl"))


@dataclass(frozen=True, kw_only=True)
class CellGrid:
    """Cell k is rows [k*grid, min((k+1)*grid, rows)): the unit of work, commit and checksum."""

    rows: int
    grid: int
    row_bytes: int
    data_offset: int

    def __len__(self) -> int:
        return -(-self.rows // self.grid)

    def range(self, cell: int) -> tuple[int, int]:
        """Rows [lo, hi) of ``cell``."""
        return cell * self.grid, min((cell + 1) * self.grid, self.rows)

    def extent(self, cell: int) -> tuple[int, int]:
        """(file offset, bytes) of ``cell``."""
        lo, hi = self.range(cell)
        return self.data_offset + lo * self.row_bytes, (hi - lo) * self.row_bytes

    def cell_at(self, lo: int, hi: int) -> int | None:
        """The cell that is exactly rows [lo, hi), or None."""
        cell = lo // self.grid
        return cell if 0 <= lo < self.rows and self.range(cell) == (lo, hi) else None

    @property
    def file_bytes(self) -> int:
        """Size of the whole file, header included."""
        return self.data_offset + self.rows * self.row_bytes


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The ``.npy`` header of a C-ordered array: the same bytes for the same dtype and shape."""
    buffer = io.BytesIO()
    fields = {"descr": FILE_DTYPES[dtype].str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


@dataclass(frozen=True, kw_only=True)
class NpyHeader:
    """What a ``.npy`` header says; data_offset: bytes before the data."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    data_offset: int

    @classmethod
    def read(cls, file: BinaryIO, name: str) -> NpyHeader:
        """The header of an open ``.npy``; StoreCorrupt names the file when it has none."""
        try:
            version = np.lib.format.read_magic(file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read(file)
        except Exception as error:  # numpy parses it as Python: a damaged one raises nearly all
            raise StoreCorrupt(
                f"{name} has no readable .npy header ({error}); extract or save it again"
            ) from None
        return cls(
            dtype=dtype,
            shape=tuple(int(n) for n in shape),
            fortran=fortran,
            data_offset=file.tell(),
        )


def read_npy_header(file: BinaryIO, name: str) -> tuple[np.dtype, tuple[int, ...], int]:
    """(dtype, shape, data offset) of a shard's open ``.npy``; StoreCorrupt for what is no shard."""
    header = NpyHeader.read(file, name)
    if header.fortran or header.dtype.hasobject:
        raise StoreCorrupt(f"{name} is Fortran-ordered or holds objects; a shard is plain C order")
    return header.dtype, header.shape, header.data_offset


def array_bytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of an array; Python ints, so that no product overflows."""
    return int(dtype.itemsize) * math.prod(shape)
