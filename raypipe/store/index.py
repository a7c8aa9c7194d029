"""The index: row -> source file, in Parquet beside the shard, read by any table library.

Columns: row int64, name, digest, size_bytes int64, valid bool, reason (null where valid). The same
rows give the same bytes. pyarrow is imported when it is used: writers do without it.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raypipe.errors import StoreCorrupt
from raypipe.store.commits import RowTable
from raypipe.store.schema import NamesDigest

if TYPE_CHECKING:
    import pyarrow as pa

_STREAMED_ROWS = 1 << 16


def index_bytes(names: Sequence[str], table: RowTable) -> bytes:
    """The Parquet file of ``names`` and their sources."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = len(names)
    valid = np.ones(rows, bool)
    valid[list(table.reasons)] = False
    columns = {
        "row": pa.array(np.arange(rows), pa.int64()),
        "name": pa.array(names, pa.string()),
        "digest": pa.array(table.digest.tolist(), pa.binary()).cast(pa.string()),
        "size_bytes": pa.array(table.size_bytes, pa.int64()),
        "valid": pa.array(valid, pa.bool_()),
        "reason": pa.array([table.reasons.get(row) for row in range(rows)], pa.string()),
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    return buffer.getvalue()


def stream_index(path: Path, names: Iterable[str], reasons: Mapping[int, str]) -> str:
    """Write the index of rows that came from no image file to ``path``; the digest of the names.

    reasons: row -> why it is invalid. Holds some thousand rows at a time. Digest is "" and size 0:
    there is no source file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("row", pa.int64()),
            ("name", pa.string()),
            ("digest", pa.string()),
            ("size_bytes", pa.int64()),
            ("valid", pa.bool_()),
            ("reason", pa.string()),
        ]
    )
    digest, left, start = NamesDigest(), iter(names), 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while some := list(islice(left, _STREAMED_ROWS)):
            digest.update(some)
            rows = range(start, start + len(some))
            why = [reasons.get(row) for row in rows]
            valid = [reason is None for reason in why]
            columns = (list(rows), some, [""] * len(some), [0] * len(some), valid, why)
            writer.write_table(pa.table(dict(zip(schema.names, columns, strict=True)), schema))
            start += len(some)
    return digest.hexdigest()


def read_index(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The index at ``path``; StoreCorrupt when it is not there or not Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # A plain handle: pyarrow would take a folder named like hive's for a data set.
        with path.open("rb") as file:
            return pq.read_table(file, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise StoreCorrupt(f"index {path} cannot be read ({error}); extract again") from None
