"""WebDataset: tar shards in row order, per sample ``000000042.npy`` and ``000000042.json``.

Written with the standard library: the same store gives the same bytes. The JSON has row, name,
digest, valid, reason and dtype (bfloat16 is uint16 in the .npy). ``export.json`` beside the shards
lists them.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from raypipe.errors import ConfigError
from raypipe.store.durable import write_atomic
from raypipe.store.formats.base import Block, Contents, Format, FormatOptions

_SHARD_BYTES = 1 << 30  # what WebDataset's own guide recommends: large sequential reads
_RECORD = 512
_LISTING = "export.json"


class WebDatasetFormat(Format):
    """Read with ``webdataset.WebDataset(OUT + "/train-{000000..000007}.tar").decode()``."""

    folder = True

    def __init__(self, contents: Contents, options: FormatOptions) -> None:
        super().__init__(contents, options)
        size = _SHARD_BYTES if options.shard_bytes is None else options.shard_bytes
        if size < 1:
            raise ConfigError(f"--shard-size {size} holds no sample; give e.g. 1GiB")
        self.shard_rows = max(1, size // self._sample_bytes())

    def _sample_bytes(self) -> int:
        """Bytes of a sample in the tar, when its JSON fits one record."""
        return 2 * _RECORD + _padded(128 + self.contents.row_bytes) + _RECORD

    def need_bytes(self) -> int:
        """Samples, names and reasons (escaped in JSON at worst 6 times as long), tar ends."""
        shards = -(-self.contents.rows // self.shard_rows)
        samples = self.contents.rows * (self._sample_bytes() + _RECORD)
        return samples + 6 * self.contents.index_bytes + shards * (tarfile.RECORDSIZE + 64) + 65536

    def write(self, target: Path, blocks: Iterator[Block]) -> None:
        """Shard after shard."""
        target.mkdir()
        shards: list[str] = []
        tar = None
        try:
            for block in blocks:
                for at, meta in enumerate(block.index.to_pylist()):
                    row = block.lo + at
                    if row % self.shard_rows == 0:
                        if tar is not None:
                            _finish(tar)
                        shards.append(f"{self.contents.name}-{len(shards):06d}.tar")
                        tar = tarfile.open(  # noqa: SIM115  # closed by _finish
                            target / shards[-1], "x", format=tarfile.USTAR_FORMAT
                        )
                    assert tar is not None
                    self._add(tar, row, block.values[at], meta)
            if tar is not None:
                _finish(tar)
        except BaseException:
            if tar is not None and tar.fileobj is not None:
                tar.fileobj.close()  # without the end marks: it is no whole shard
            raise
        listing = {**self.contents.facts, "shard_rows": self.shard_rows, "shards": shards}
        write_atomic(target / _LISTING, json.dumps(listing, indent=1).encode() + b"\n")

    def _add(self, tar: tarfile.TarFile, row: int, values: np.ndarray, meta: dict) -> None:
        kept = {key: meta[key] for key in ("name", "digest", "valid", "reason")}
        facts = {"row": row, **kept, "dtype": self.contents.dtype}
        array = io.BytesIO()
        np.lib.format.write_array(array, np.asarray(values), version=(1, 0))
        for kind, data in (("npy", array.getvalue()), ("json", json.dumps(facts).encode())):
            info = tarfile.TarInfo(f"{row:09d}.{kind}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

    @classmethod
    def made(cls, path: Path) -> bool:
        """Our listing is there."""
        try:
            return json.loads((path / _LISTING).read_bytes())["format"] == "webdataset"
        except (OSError, ValueError, KeyError, TypeError):
            return False


def _padded(size: int) -> int:
    return -(-size // _RECORD) * _RECORD


def _finish(tar: tarfile.TarFile) -> None:
    path = Path(str(tar.name))
    tar.close()
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
