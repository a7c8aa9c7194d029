"""``raypipe store info | verify | adopt``: what a person sees of a store, and makes one of a file.

Copies of stores, in other formats or on other disks, are `copy_commands`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from raypipe.errors import ConfigError, InputError, MissingInput, StoreCorrupt
from raypipe.progress import Progress
from raypipe.provenance import run_record
from raypipe.store.adoption import adopt, plan_adoption
from raypipe.store.info import describe, find_shards
from raypipe.store.verify import VerifyReport, verify
from raypipe.units import format_bytes, format_seconds


@dataclass(frozen=True, kw_only=True)
class InfoConfig:
    """Show what stores hold, or how far an unfinished one is."""

    store: Positional[Path]
    """A shard's .npy file, or a folder: then every shard below it."""
    json: bool = False
    """One JSON object a shard, with everything its manifest says."""


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Read every byte of finished stores and compare it with the manifest's checksums."""

    store: Positional[Path]
    """A shard's .npy file, or a folder: then every shard below it."""
    threads: int | None = None
    """Threads that read and hash; by default one a core, at most 4."""

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"--threads {self.threads} is below 1; leave it out for the default")


@dataclass(frozen=True, kw_only=True)
class AdoptConfig:
    """Make a store of a plain .npy where it lies: manifest, checksums and index beside it."""

    file: Positional[Path]
    """A .npy of rows, C order, little-endian; its bytes are not touched."""
    names: Path | None = None
    """Row names: a text file, one a line, or a .csv with a column "name"; else row numbers."""
    bfloat16: bool = False
    """The file's uint16 are the bits of bfloat16."""
    threads: int | None = None
    """Threads that read and hash; by default one a core, at most 4."""
    dry_run: bool = False
    """Say what would be made, and stop; the data is not read."""

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"--threads {self.threads} is below 1; leave it out for the default")


def info(cfg: InfoConfig) -> None:
    """Print a line a shard; one that cannot be read is named, and raised after the others.

    Raises MissingInput when there is none.
    """
    unread: list[InputError] = []
    for path in _shards(cfg.store):
        try:
            facts = describe(path)
        except InputError as error:
            unread.append(error)
            continue
        print(json.dumps(facts, default=str) if cfg.json else info_line(path, facts))
    if unread:
        raise unread[0]


def info_line(path: Path, facts: dict[str, Any]) -> str:
    """``PATH  sealed  (240, 49, 512) float16  11.5 MiB  resnet18 layer4  2 invalid``."""
    shape = tuple(facts["shape"])
    parts = [str(path), facts["state"], f"{shape} {facts['dtype']}", format_bytes(facts["bytes"])]
    parts.append(_origin(facts.get("identity") or {}))
    if facts["state"] != "sealed":
        parts.append(f"{facts['rows_done']} of {shape[0]} rows committed")
        if facts.get("owner"):
            parts.append(_owner_text(facts["owner"]))
    if facts.get("invalid_rows"):
        parts.append(f"{facts['invalid_rows']} invalid rows")
    error = (facts.get("narrowing") or {}).get("max_relative_error")
    if error:
        parts.append(f"narrowing erred by at most {error:.2g} of a value")
    return "  ".join(parts)


def _origin(identity: dict[str, Any]) -> str:
    named = [str(identity[key]) for key in ("arch", "module", "part") if identity.get(key)]
    return " ".join(named) or str(identity.get("source") or "foreign")


def _owner_text(owner: dict[str, Any]) -> str:
    states = {True: "running", False: "dead: run the same command to resume"}
    state = states.get(owner["alive"], "not known from this host")
    return f"owner pid {owner['pid']} on {owner['host']} ({state})"


def verify_stores(cfg: VerifyConfig) -> None:
    """Check every shard; raises StoreCorrupt after the last one when any is damaged."""
    shards = _shards(cfg.store)
    damaged = []
    with Progress("verify", len(shards), "shards") as progress:
        for path in shards:
            report = verify(path, cfg.threads)
            progress.update(1)
            print(verify_line(path, report))
            if not report.ok:
                damaged.append(path)
    sys.stdout.flush()
    if damaged:
        raise StoreCorrupt(
            f"{len(damaged)} of {len(shards)} shards are damaged, first {damaged[0]}; restore them "
            "from a copy, or extract again with --overwrite"
        )


def verify_line(path: Path, report: VerifyReport) -> str:
    """``PATH  ok  11.5 MiB in 0.1 s``, or what is wrong and where."""
    if report.ok:
        size = format_bytes(report.bytes_read)
        return f"{path}  ok  {size} in {format_seconds(report.seconds)}"
    ranges = ", ".join(f"[{lo}, {hi})" for lo, hi in report.bad_ranges[:8])
    problems = [*report.problems, *([f"rows {ranges} differ"] if ranges else [])]
    return f"{path}  DAMAGED  {'; '.join(problems)}"


def adopt_file(cfg: AdoptConfig) -> None:
    """Adopt the file and print the line that ``store info`` has for it."""
    plan = plan_adoption(cfg.file, names=cfg.names, bfloat16=cfg.bfloat16)
    size = format_bytes(plan.cells.file_bytes)
    if cfg.dry_run:
        print(
            f"{cfg.file}  would be adopted  {plan.shape} {plan.dtype}  {size} to read, at most "
            f"{format_bytes(plan.need_bytes)} to write beside it"
        )
        return
    with Progress("adopt", plan.shape[0], "rows") as progress:
        path = adopt(
            plan, threads=cfg.threads, provenance=run_record(cfg), progress=progress.update
        )
    print(info_line(path, describe(path)))


def _shards(store: Path) -> list[Path]:
    found = find_shards(store)
    if not found:
        raise MissingInput(
            f"{store}: no store there; give a shard's .npy file or a folder of stores"
        )
    return found
