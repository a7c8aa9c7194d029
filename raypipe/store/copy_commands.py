"""``raypipe store export`` and ``raypipe store replicate``: a store elsewhere, or as something else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from raypipe.errors import ConfigError, StoreError
from raypipe.progress import Progress
from raypipe.store.catalog import Place, add_place, this_node
from raypipe.store.export import export_store, plan_export
from raypipe.store.formats import FormatOptions
from raypipe.store.replicate import plan_replicas, replicate_store, require_room
from raypipe.store.space import may_write
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


@dataclass(frozen=True, kw_only=True)
class ReplicateConfig:
    """Copy finished stores to another disk, checked on the way, and note where they lie.

    A copy that is there already is kept; one that was broken off goes on.
    """

    store: Positional[Path]
    """A shard's .npy file, or a folder: then every shard below it."""
    to: Path
    """The folder for the copies, e.g. on this node's own disk."""
    margin: str = "1GiB"
    """What must stay free on that disk."""
    node: str | None = None
    """Id of the node that the disk belongs to; by default RAYPIPE_NODE or this host's name."""
    catalog: bool = True
    """Note the copy in the .places.json beside the store, where readers look for it."""
    threads: int | None = None
    """Threads that copy; by default one a core, at most 4."""
    dry_run: bool = False
    """Say what would be copied, and stop."""

    def __post_init__(self) -> None:
        parse_bytes(self.margin)
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"--threads {self.threads} is below 1; leave it out for the default")
        if self.node == "":
            raise ConfigError("--node is empty; leave it out for this host's name")


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


def replicate(cfg: ReplicateConfig) -> None:
    """Copy all or nothing of what does not fit; a line a shard."""
    replicas = plan_replicas(cfg.store, cfg.to)
    if cfg.catalog:
        _require_writable({replica.source.parent for replica in replicas})
    require_room(replicas, cfg.to, parse_bytes(cfg.margin))
    if cfg.dry_run:
        for replica in replicas:
            there = replica.step == "there"
            says = "is there" if there else f"would take {format_bytes(replica.need_bytes)}"
            print(f"{replica.source}  {says}  {replica.target}")
        return
    lines = []
    with Progress("replicate", sum(r.manifest.shape[0] for r in replicas), "rows") as progress:
        for replica in replicas:
            path = replicate_store(replica, threads=cfg.threads, progress=progress.update)
            if cfg.catalog:
                place = Place(cfg.node or this_node(), path.absolute())
                add_place(replica.source, replica.manifest.fingerprint, place)
            done = {"there": "was there", "again": "was damaged: copied again"}
            lines.append(f"{replica.source}  {done.get(replica.step, 'copied')}  {path}")
    print("\n".join(lines))


def _require_writable(folders: set[Path]) -> None:
    for folder in sorted(folders):
        if not may_write(folder):
            raise StoreError(
                f"{folder} cannot be written, so its copies cannot be noted there; --no-catalog "
                "copies without a note, name the copy to its readers yourself"
            )
