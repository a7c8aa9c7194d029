"""Prediction files: float32 .npy of (images, vertices), filled row by row, there when whole.

Written with pwrite, so that a full disk is an error with a number and not a killed process.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import NoSpace
from raypipe.store.durable import fsync_dir, make_dirs, pwrite_all
from raypipe.store.layout import npy_header


class PredictionFile:
    """Rows into ``path``; in a ``with`` block, at whose end the file appears, or does not."""

    def __init__(self, path: Path, n_rows: int, n_vertices: int) -> None:
        self.path = path
        self._part = path.with_name(f".{path.name}.part")
        self._shape = (n_rows, n_vertices)
        self._header = npy_header("float32", self._shape)

    def __enter__(self) -> PredictionFile:
        make_dirs(self.path.parent)
        self._fd = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            os.posix_fallocate(self._fd, 0, len(self._header) + 4 * self._shape[0] * self._shape[1])
            pwrite_all(self._fd, self._header, 0)
        except OSError as error:
            self._drop()
            raise self._explained(error) from error
        return self

    def write(self, place: int, values: NDArray[np.float32]) -> None:
        """Row ``place`` : (n_vertices,). Raises NoSpace."""
        data = np.ascontiguousarray(values, "<f4")
        try:
            pwrite_all(self._fd, data.data, len(self._header) + place * data.nbytes)
        except OSError as error:
            raise self._explained(error) from error

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._drop()
            return
        os.fsync(self._fd)
        os.close(self._fd)
        self._part.replace(self.path)
        fsync_dir(self.path.parent)

    def _drop(self) -> None:
        os.close(self._fd)
        self._part.unlink(missing_ok=True)

    def _explained(self, error: OSError) -> Exception:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return error
        needed = len(self._header) + 4 * self._shape[0] * self._shape[1]
        return NoSpace(f"{self.path} needs {needed} bytes and the disk is full; free space first")
