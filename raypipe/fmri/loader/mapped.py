"""``MemoryMappedArray``: an array in a ``.npy`` file, mapped, and shared by pickling its name alone.

The file has all its blocks before it is mapped: a store into a map of a full disk would be SIGBUS,
here it is NoSpace when the array is made. Pickled, it is a handle of some hundred bytes that is
opened again where it lands; only the object that made the file removes it.
"""

from __future__ import annotations

import io
import math
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from raypipe.errors import InputError, MissingInput, StoreCorrupt
from raypipe.memory.config import GIB
from raypipe.store.durable import pwrite_all
from raypipe.store.space import explain_os_errors, preallocate

Mode = Literal["r", "r+"]

_STEP_BYTES = 8 << 20  # copied or filled at a time


class MemoryMappedArray:
    """An array that lives in a file. Made by `create`, `of` or `open`; a context manager."""

    def __init__(self, path: Path, mode: Mode, *, owned: bool) -> None:
        """Map the file at ``path``. owned : `cleanup` removes it."""
        self.path, self.mode, self._owned = path.absolute(), mode, owned
        self._array: np.memmap[Any, Any] | None = _mapped(self.path, mode)
        self.shape, self.dtype = self._array.shape, self._array.dtype

    @classmethod
    def create(
        cls, path: Path, shape: tuple[int, ...], dtype: DTypeLike, *, order: Literal["C", "F"] = "C"
    ) -> MemoryMappedArray:
        """A writable array of zeros in a new file. Raises NoSpace when the disk does not hold it."""
        _reserve(path, np.dtype(dtype), shape, order)
        return cls(path, "r+", owned=True)

    @classmethod
    def of(cls, path: Path, data: ArrayLike, *, writable: bool = False) -> MemoryMappedArray:
        """A new file with a copy of ``data``, written a piece at a time."""
        values = np.asanyarray(data)
        fortran = values.flags.f_contiguous and not values.flags.c_contiguous
        start = _reserve(path, values.dtype, values.shape, "F" if fortran else "C")
        _fill(path, start, values.T if fortran else values)
        return cls(path, "r+" if writable else "r", owned=True)

    @classmethod
    def open(cls, path: Path, mode: Mode = "r") -> MemoryMappedArray:
        """The array of an existing ``.npy``; its file stays when this object goes."""
        return cls(Path(path), mode, owned=False)

    @property
    def array(self) -> NDArray[Any]:
        """The mapped array; read-only unless made writable. Raises InputError once closed."""
        if self._array is None:
            raise InputError(f"mapped array {self.path} is closed; open it again")
        return self._array

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * int(self.dtype.itemsize)

    @property
    def size_gb(self) -> float:
        """Size of the array in GiB."""
        return self.nbytes / GIB

    def flush(self) -> None:
        """Put what was stored on the disk; processes of this node see it without that."""
        if self._array is not None and self.mode == "r+":
            with explain_os_errors(self.path, 0):
                self._array.flush()

    def close(self) -> None:
        """Let go of the map, the file stays; again is no harm. Views taken before stay readable."""
        self.flush()
        self._array = None

    def cleanup(self) -> None:
        """Close, and remove the file if this object made it."""
        self._array = None  # what is removed need not be flushed
        if self._owned:
            self.path.unlink(missing_ok=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return MemoryMappedArray.open, (self.path, self.mode)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.array, dtype=dtype, copy=copy)

    def __enter__(self) -> MemoryMappedArray:
        return self

    def __exit__(self, *_: object) -> None:
        self.cleanup()

    def __repr__(self) -> str:
        state = "closed" if self._array is None else self.mode
        return f"MemoryMappedArray({str(self.path)!r}, {self.shape}, {self.dtype}, {state})"


def _mapped(path: Path, mode: Mode) -> np.memmap[Any, Any]:
    try:
        return np.lib.format.open_memmap(path, mode=mode)
    except FileNotFoundError:
        raise MissingInput(
            f"mapped array {path} is not there; its owner removed it, or it is of another node"
        ) from None
    except ValueError as error:
        why = " ".join(str(error).split())
        raise StoreCorrupt(f"{path} cannot be mapped ({why}); write it again") from error


def _reserve(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], order: str) -> int:
    """A new .npy of zeros with all its blocks; returns where the values start."""
    if dtype.hasobject or not math.prod(shape):
        raise InputError(
            f"an array of shape {shape} and type {dtype} cannot be mapped; give numbers, at least one"
        )
    header = _header(dtype, shape, order)
    size = len(header) + math.prod(shape) * int(dtype.itemsize)
    with explain_os_errors(path, size):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            pwrite_all(fd, header, 0)
            if preallocate(fd, path, size) != "fallocate":  # a hole may find the disk full later
                for at in range(len(header), size, _STEP_BYTES):
                    pwrite_all(fd, bytes(min(_STEP_BYTES, size - at)), at)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
    return len(header)


def _header(dtype: np.dtype[Any], shape: tuple[int, ...], order: str) -> bytes:
    buffer = io.BytesIO()
    fields = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": order == "F",
        "shape": shape,
    }
    np.lib.format.write_array_header_1_0(buffer, fields)
    return buffer.getvalue()


def _fill(path: Path, start: int, values: NDArray[Any]) -> None:
    """Write ``values`` in C order from byte ``start`` on, some rows at a time."""
    rows = values.reshape(1) if values.ndim == 0 else values
    row_bytes = max(1, rows.nbytes // len(rows))
    step = max(1, _STEP_BYTES // row_bytes)
    with explain_os_errors(path, values.nbytes), path.open("r+b") as file:
        for lo in range(0, len(rows), step):
            piece = np.ascontiguousarray(rows[lo : lo + step])
            pwrite_all(file.fileno(), piece.reshape(-1).view(np.uint8).data, start + lo * row_bytes)
