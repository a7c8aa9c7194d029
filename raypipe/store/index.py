"""The index: row -> source file, in Parquet beside the shard, read by any table library.

Columns: row int64, name, digest, size_bytes int64, valid bool, reason (null where valid). The same
rows give the same bytes. pyarrow is imported when it is used: writers do without it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raypipe.errors import StoreCorrupt
from raypipe.store.commits import RowTable

if TYPE_CHECKING:
    import pyarrow as pa


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
