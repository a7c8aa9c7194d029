"""The formats that a store is exported to, one file each; `base` is what they have in common.

Adding one: a class like `npy.NpyFormat` and a line in `FORMATS`. The order of steps (space,
temporary name, rename) is `raypipe.store.export`'s.
"""

from __future__ import annotations

from raypipe.store.formats.base import Block, Contents, Format, FormatOptions
from raypipe.store.formats.npy import NpyFormat
from raypipe.store.formats.parquet import ParquetFormat
from raypipe.store.formats.webdataset import WebDatasetFormat
from raypipe.store.formats.zarr_v3 import ZarrFormat

FORMATS: dict[str, type[Format]] = {
    "npy": NpyFormat,
    "parquet": ParquetFormat,
    "zarr": ZarrFormat,
    "webdataset": WebDatasetFormat,
}

__all__ = ["FORMATS", "Block", "Contents", "Format", "FormatOptions"]
