"""What is there of a result already, looked at without taking it over: nothing is written or locked.

Another run may hold the result, and write to it all the while: its owner is named, not refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from raypipe.store.lock import Owner
from raypipe.store.space import free_bytes
from raypipe.tile.config import TileConfig
from raypipe.tile.field import Field
from raypipe.tile.identity import digest_of_model
from raypipe.tile.ledger import DONE, TileRun, claims_in, paths_of, read_manifest
from raypipe.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class Left:
    """What an earlier run left of a result.

    recorded : tiles with a record, whose bytes are checked when the run goes on; owner : who writes it
    now, "" for nobody
    """

    finished: bool
    recorded: int
    owner: str


def said_finished(out: Path) -> bool:
    """Whether a complete result lies at ``out``; of what it was made is `TileRun.is_finished`'s to say."""
    return (read_manifest(paths_of(out).manifest) or {}).get("state") == DONE and out.exists()


def look(run: TileRun, *, overwrite: bool) -> Left:
    """Raises StoreError, FingerprintMismatch where `TileRun.open` would."""
    if run.is_finished(overwrite=overwrite):
        return Left(finished=True, recorded=len(run.done), owner="")
    paths = run.paths
    there = paths.partial.exists() or paths.final.exists()
    claims = claims_in(paths.journals(), run.fingerprint, len(run.done)) if there else {}
    owner = Owner.read(paths.owner)
    return Left(
        finished=False,
        recorded=len(claims),
        owner=str(owner) if owner is not None and owner.alive else "",
    )


def known_field(out: Path, model: nn.Module, cfg: TileConfig, dims: int) -> Field | None:
    """The field of this very model as the run that began ``out`` measured it; None where there is none,
    or it is not to be measured.
    """
    if cfg.blend is not None or cfg.halo is not None:
        return None
    found = read_manifest(paths_of(out).manifest) or {}
    field, identity = found.get("field") or {}, found.get("identity") or {}
    if field.get("how") != "measured" or identity.get("model") != digest_of_model(model):
        return None
    known = Field(radius=tuple(field["radius"]), align=tuple(field["align"]))
    return known if len(known.align) == dims else None


def disk_words(run: TileRun, left: Left) -> str:
    """Bytes that the result takes, and whether they are free."""
    need, folder = run.spec.nbytes, run.paths.folder
    free = free_bytes(folder)
    exact = "at most" if run.spec.kind == "zarr" else "exactly"
    text = f"{run.paths.final.name} {exact} {need} bytes ({format_bytes(need)})"
    if left.finished:
        return f"{text}, there already"
    if free is None:
        return f"{text}; {folder} does not say how much is free"
    text += f", {format_bytes(free)} are free in {folder}"
    missing = run.missing_bytes() - free
    if missing > 0:
        text += f": {format_bytes(missing)} too few, it would be refused with exit code 3"
    return text
