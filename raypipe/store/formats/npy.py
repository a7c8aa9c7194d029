"""One plain ``.npy``: the store's own bytes under another name, or widened to float32."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from raypipe.store.durable import write_all
from raypipe.store.formats.base import Block, Format
from raypipe.store.layout import npy_header
from raypipe.store.space import preallocate


class NpyFormat(Format):
    """Read with ``np.load(path, mmap_mode="r")``."""

    def need_bytes(self) -> int:
        """Exactly the file."""
        return len(self._header()) + self.contents.rows * self.contents.row_bytes

    def write(self, target: Path, blocks: Iterator[Block]) -> None:
        """Header, then the rows."""
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            preallocate(fd, target, self.need_bytes())
            write_all(fd, self._header())
            for block in blocks:
                write_all(fd, block.values.reshape(-1).view("u1").data)
            os.fsync(fd)
        finally:
            os.close(fd)

    def _header(self) -> bytes:
        return npy_header(self.contents.dtype, self.contents.shape)
