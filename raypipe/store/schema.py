"""What a shard is to hold, said before a byte of it is written: `ShardSpec` and its fingerprint.

The fingerprint covers what decides the bytes of a row and their place (identity, shape, dtype,
grid, names, header length, format version). Provenance and token layout are described by it, not
part of it: a new library version alone does not make a half-written store useless.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from raypipe.errors import ConfigError
from raypipe.store.layout import (
    FILE_DTYPES,
    WRITTEN_DTYPES,
    CellGrid,
    ShardPaths,
    array_bytes,
    npy_header,
)

FORMAT = "raypipe-store"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """One shard: ``rows`` samples of ``row_shape``, named in row order.

    path: the final file, ``<root>/<feature>/<subject>/train.npy``.
    names: source file name of each row. grid: rows a batch, so a cell of work and of checksums.
    identity: what decides the values (backbone, layer, preprocessing, weights sha256, precision).
    token_layout, provenance: described in the manifest, not compared.
    Raises ConfigError for a value that breaks its rule.
    """

    path: Path
    rows: int
    row_shape: tuple[int, ...]
    dtype: str
    names: tuple[str, ...]
    grid: int
    identity: Mapping[str, Any]
    token_layout: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        object.__setattr__(self, "row_shape", tuple(int(n) for n in self.row_shape))
        object.__setattr__(self, "names", tuple(self.names))
        for mapping in ("identity", "token_layout", "provenance"):
            object.__setattr__(self, mapping, _plain_json(mapping, getattr(self, mapping)))
        ShardPaths.of(self.path)
        if self.rows < 1 or self.grid < 1 or any(n < 1 for n in self.row_shape):
            raise ConfigError(
                f"rows {self.rows}, grid {self.grid}, row_shape {self.row_shape}: all must be at "
                "least 1; an empty split has no shard"
            )
        if self.dtype not in WRITTEN_DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not one of {', '.join(WRITTEN_DTYPES)}")
        if len(self.names) != self.rows:
            raise ConfigError(f"{len(self.names)} names for {self.rows} rows; give one name a row")
        self._check_names()

    def _check_names(self) -> None:
        for name in self.names:
            try:
                name.encode()
            except UnicodeEncodeError:
                raise ConfigError(f"file name {name!r} is not valid UTF-8; rename it") from None

    @property
    def paths(self) -> ShardPaths:
        """The files that belong to this shard."""
        return ShardPaths.of(self.path)

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, *row_shape), as in the ``.npy`` header."""
        return (self.rows, *self.row_shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in the file."""
        return array_bytes(FILE_DTYPES[self.dtype], self.row_shape)

    @cached_property
    def header(self) -> bytes:
        """The ``.npy`` header."""
        return npy_header(self.dtype, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the file, header included."""
        return self.cells.file_bytes

    @property
    def cells(self) -> CellGrid:
        """The grid of cells."""
        return CellGrid(
            rows=self.rows,
            grid=self.grid,
            row_bytes=self.row_bytes,
            data_offset=len(self.header),
        )

    @cached_property
    def essence(self) -> dict[str, Any]:
        """What the fingerprint is taken over; kept in the manifest so a mismatch can be named."""
        return {
            "format_version": FORMAT_VERSION,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "grid": self.grid,
            "data_offset": len(self.header),
            "names_digest": names_digest(self.names),
            "identity": self.identity,
        }

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON of `essence`, hex."""
        return fingerprint_of(self.essence)


def fingerprint_of(essence: Mapping[str, Any]) -> str:
    """sha256 hex of ``essence`` as canonical JSON."""
    return hashlib.sha256(canonical_json(essence)).hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one spelling of ``value``: sorted keys, no spaces, UTF-8, no NaN."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


class NamesDigest:
    """sha256 of names in order; a JSON string a line, so no two lists spell alike."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def update(self, names: Iterable[str]) -> None:
        """Take in the next names."""
        for name in names:
            self._sha256.update(json.dumps(name).encode() + b"\n")

    def hexdigest(self) -> str:
        """The digest of all so far."""
        return self._sha256.hexdigest()


def names_digest(names: Iterable[str]) -> str:
    """`NamesDigest` of ``names``, hex."""
    digest = NamesDigest()
    digest.update(names)
    return digest.hexdigest()


def differences(stored: Any, asked: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, stored value, asked value) of each leaf where two JSON trees differ."""
    if isinstance(stored, Mapping) and isinstance(asked, Mapping):
        for name in sorted({*stored, *asked}):
            child = f"{key}.{name}" if key else name
            yield from differences(stored.get(name), asked.get(name), child)
    elif stored != asked:
        yield key, stored, asked


def _plain_json(what: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` as JSON gives it back (tuples are lists), so that equal means equal on disk."""
    try:
        plain = json.loads(canonical_json(dict(value)))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what} is not plain JSON ({error}); use str, numbers, lists") from None
    return dict(plain)
