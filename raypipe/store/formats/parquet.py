"""Parquet with Arrow's fixed-shape tensor type: columns row, name, digest, valid, reason, features.

Read with ``pyarrow.parquet.read_table(path)["features"].combine_chunks().to_numpy_ndarray()``; no
raypipe is needed, and a reader without the extension type sees fixed-size lists. The schema's
metadata has a key ``raypipe``: JSON with the dtype (bfloat16 is uint16 in the file, bool uint8, of
which Arrow has tensors), the fingerprint and the identity.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raypipe.store.formats.base import Block, Format

if TYPE_CHECKING:
    import pyarrow as pa

_COLUMNS = ("row", "name", "digest", "valid", "reason")
_TEXTS = [*_COLUMNS[1:3], "reason"]  # features are numbers: a dictionary of them only costs
# Parquet's own integers have 32 or 64 bits; float16 is kept as 2 bytes.
_PARQUET_BYTES = {"bfloat16": 4, "uint16": 4, "int16": 4, "uint8": 4, "int8": 4, "bool": 4}


class ParquetFormat(Format):
    """One file, a row group a block."""

    def need_bytes(self) -> int:
        """Values without compression, twice the plain index, page and row group headers."""
        contents = self.contents
        itemsize = _PARQUET_BYTES.get(contents.dtype, contents.numpy_dtype.itemsize)
        values = contents.rows * math.prod(contents.row_shape) * itemsize
        groups = -(-contents.rows // self.block_rows)
        return values + values // 64 + 2 * contents.index_bytes + 64 * contents.rows + 4096 * groups

    def write(self, target: Path, blocks: Iterator[Block]) -> None:
        """One table a block; memory is that of a row group."""
        import pyarrow.parquet as pq

        schema = self._schema()
        with (
            target.open("xb") as file,
            pq.ParquetWriter(
                file,
                schema,
                compression=self._compression(),
                use_dictionary=_TEXTS,
                write_statistics=["row"],
            ) as writer,
        ):
            for block in blocks:
                writer.write_table(self._table(block, schema))
            writer.close()
            file.flush()
            os.fsync(file.fileno())

    def _compression(self) -> dict[str, str]:
        """Float noise hardly shrinks and costs most of the time; small integers, which Parquet
        keeps in 4 bytes, do shrink.
        """
        padded = self.contents.dtype in _PARQUET_BYTES
        features = {"features.list.element": "zstd" if padded else "none"}
        return dict.fromkeys(_COLUMNS, "zstd") | features

    def _schema(self) -> pa.Schema:
        import pyarrow as pa

        contents = self.contents
        kind = pa.from_numpy_dtype(_tensor_dtype(contents.numpy_dtype))
        fields = [
            ("row", pa.int64()),
            ("name", pa.string()),
            ("digest", pa.string()),
            ("valid", pa.bool_()),
            ("reason", pa.string()),
            ("features", pa.fixed_shape_tensor(kind, contents.row_shape)),
        ]
        return pa.schema(fields, {"raypipe": json.dumps(contents.facts)})

    def _table(self, block: Block, schema: pa.Schema) -> pa.Table:
        import pyarrow as pa

        tensor = schema.field("features").type
        # The block's memory is used again; write_table has encoded it by then.
        flat = pa.array(block.values.reshape(-1).view(_tensor_dtype(block.values.dtype)))
        storage = pa.FixedSizeListArray.from_arrays(flat, math.prod(self.contents.row_shape))
        features = pa.ExtensionArray.from_storage(tensor, storage)
        columns = [block.index.column(name).combine_chunks() for name in _COLUMNS]
        return pa.Table.from_arrays([*columns, features], schema=schema)


def _tensor_dtype(dtype: np.dtype) -> np.dtype:
    return np.dtype("u1") if dtype.kind == "b" else dtype
