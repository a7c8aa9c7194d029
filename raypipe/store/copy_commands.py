"""``raypipe store export`` and ``raypipe store replicate``: a store elsewhere, or as something else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from raypipe.errors import ConfigError
from raypipe.progress import Progress
from raypipe.store.export import export_store, plan_export
from raypipe.store.formats import FormatOptions
from raypipe.units import format_bytes, parse_bytes


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a finished store in a format that others read without raypipe.

    bfloat16 goes out as its bits in uint16, which the format's metadata says; or --float32.
    """

    store: Positional[Path]
    """A shard's .npy file."""
    to: Literal["npy", "parquet", "zarr", "webdataset"]
    """npy: one plain array. parquet: Arrow's tensor type. zarr: Zarr v3. webdataset: tar shards."""
    out: Path
    """The file (npy, parquet) or folder (zarr, webdataset) to write."""
    float32: bool = False
    """Widen float16 or bfloat16 to float32; exact."""
    chunk_rows: int = 1
    """zarr: rows a chunk."""
    shard_size: str | None = None
    """zarr, webdataset: about the size of a shard file; by default 64MiB and 1GiB; zarr with 0: a
    file a chunk."""
    overwrite: bool = False
    """Replace an earlier export at --out, once the new one is whole."""
    dry_run: bool = False
    """Say what would be written, and stop."""

    def __post_init__(self) -> None:
        if self.shard_size is not None:
            parse_bytes(self.shard_size)
            if self.to not in ("zarr", "webdataset"):
                raise ConfigError(f"--shard-size {self.shard_size}: {self.to} has no shards")
        if self.chunk_rows != 1 and self.to != "zarr":
            raise ConfigError(
                f"--chunk-rows {self.chunk_rows}: only zarr has chunks, not {self.to}"
            )


def export(cfg: ExportConfig) -> None:
    """Write the export and print what it is."""
    shard_bytes = None if cfg.shard_size is None else parse_bytes(cfg.shard_size)
    plan = plan_export(
        cfg.store,
        cfg.to,
        cfg.out,
        float32=cfg.float32,
        options=FormatOptions(chunk_rows=cfg.chunk_rows, shard_bytes=shard_bytes),
        overwrite=cfg.overwrite,
    )
    contents = plan.format.contents
    what = f"{contents.shape} {contents.dtype} as {cfg.to}"
    if cfg.dry_run:
        print(f"{cfg.out}  would be written  {what}  at most {format_bytes(plan.need_bytes)}")
        return
    with Progress("export", contents.rows, "rows") as progress:
        export_store(plan, progress.update)
    print(f"{cfg.out}  written  {what}")
