"""A store on nodes' disks, for who sees its catalog only: `PlacedStore`, all that it is but its rows.

Beside the catalog lies a note, ``train.places.parquet``: name and valid flag of each row, and in its
metadata what the manifest says of their meaning. `catalog.declare` writes it on a node that has the
store. So a run is planned, checked and resumed where not one of the disks is seen; who brings the rows
themselves is `raypipe.cluster`'s business.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.errors import StoreCorrupt, StoreError
from raypipe.store.durable import write_atomic
from raypipe.store.index import read_index
from raypipe.store.layout import ShardPaths
from raypipe.store.reader import FeatureStore, StoreLocator

_KEY = b"raypipe-store"
_MEANING = ("identity", "token_layout")


def note_of(store: Path) -> Path:
    """The note beside the catalog of ``store``."""
    return ShardPaths.of(store).places.with_suffix(".parquet")


def write_note(store: FeatureStore, at: Path) -> None:
    """Note what ``store`` is beside the catalog at ``at``. Always anew: rows that were invalid may have
    been mended since, which the fingerprint does not tell.
    """
    import pyarrow.parquet as pq

    note = note_of(at)
    said = {key: store.manifest.get(key) or {} for key in _MEANING}
    said["fingerprint"] = store.fingerprint
    table = store.index.select(["name", "valid"])
    buffer = io.BytesIO()
    metadata = {_KEY: json.dumps(said, ensure_ascii=False).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), buffer, compression="zstd")
    write_atomic(note, buffer.getvalue())


@dataclass(frozen=True, eq=False, kw_only=True)
class PlacedStore:
    """What ``contents``, a catalog's, stands for. As of a `FeatureStore`: ``names`` and ``valid``
    (rows,), and of ``manifest`` the fields ``identity`` and ``token_layout``.
    """

    contents: StoreLocator
    names: tuple[str, ...]
    valid: np.ndarray
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, contents: StoreLocator) -> PlacedStore:
        """By the note. Raises StoreError when there is none, or it is another store's, StoreCorrupt
        when it cannot be read.
        """
        note = note_of(contents.path)
        said = _meaning(note) if note.exists() else {}
        if said.get("fingerprint") != contents.fingerprint:
            other = "is of another store" if said else "is not there"
            raise StoreError(
                f"{contents.path} lies on nodes' disks, and {note.name}, which says what its rows are, "
                f"{other}; write it on a node that has the store: raypipe store place STORE --catalog "
                "FOLDER"
            )
        table = read_index(note, ["name", "valid"])
        if table.num_rows != contents.shape[0]:
            raise StoreCorrupt(
                f"{note} has {table.num_rows} rows, the store {contents.shape[0]}; remove it, then "
                "raypipe store place on a node that has the store"
            )
        return cls(
            contents=contents,
            names=tuple(table.column("name").to_pylist()),
            valid=table.column("valid").to_numpy(),
            manifest={key: said[key] for key in _MEANING},
        )

    @property
    def path(self) -> Path:
        """The one that stands for the store."""
        return self.contents.path

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, *row_shape)."""
        return self.contents.shape

    @property
    def logical_dtype(self) -> str:
        """As `FeatureStore.logical_dtype`."""
        return self.contents.dtype

    @property
    def fingerprint(self) -> str:
        """sha256 of what decides the bytes."""
        return self.contents.fingerprint

    def locator(self) -> StoreLocator:
        """What stands for the store wherever its rows are read."""
        return self.contents


def _meaning(note: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(note).metadata or {}
        return dict(json.loads(metadata[_KEY]))
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise StoreCorrupt(
            f"{note} cannot be read ({error!r}); remove it, then raypipe store place on a node that "
            "has the store"
        ) from None
