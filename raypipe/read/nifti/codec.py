"""Which library decompresses a ``.gz``: isal, then zlib-ng, then Python's own zlib.

Measured on one core of this project's test machine, 99x117x95x320 of smooth noise in a brain mask
(MB/s of decompressed data, float32 / scaled int16): isal 900 / 830, zlib-ng 780 / 740, zlib
440 / 440. isal's and zlib-ng's reading *threads* were slower than their plain readers (640 / 750,
720 / 690), so the thread that reads ahead is ours (`slabs`). All three check the stream's CRC.
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from gzip import BadGzipFile
from pathlib import Path
from typing import BinaryIO

from raypipe.errors import InputError

#: (name, module with ``open``, module with ``error``), fastest first.
_CODECS = (
    ("isal", "isal.igzip", "isal.isal_zlib"),
    ("zlib-ng", "zlib_ng.gzip_ng", "zlib_ng.zlib_ng"),
    ("zlib", "gzip", "zlib"),
)
NAMES = tuple(name for name, _, _ in _CODECS)


@dataclass(frozen=True, kw_only=True)
class Codec:
    """A gzip reader.

    open   : (path, "rb") -> binary stream of the decompressed bytes
    errors : what it raises for a stream that is damaged or cut short
    """

    name: str
    open: Callable[[Path, str], BinaryIO]
    errors: tuple[type[Exception], ...]


def find_codec(names: Sequence[str] = NAMES) -> Codec:
    """The first of ``names`` that is installed; zlib always is."""
    for name, opener, errors in _CODECS:
        if name not in names:
            continue
        try:
            opening, raising = importlib.import_module(opener), importlib.import_module(errors)
        except ImportError:
            continue
        damage = (EOFError, BadGzipFile, zlib.error, raising.error)
        return Codec(name=name, open=opening.open, errors=damage)
    raise InputError(
        f"no gzip reader of {', '.join(names)} is installed; pip install isal, or name zlib"
    )
