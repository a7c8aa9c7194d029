"""What there is to say about a shard, finished or not, for ``raypipe store info``. Reads only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raypipe.errors import MissingInput, StoreError
from raypipe.store.layout import ShardPaths
from raypipe.store.lock import Owner
from raypipe.store.manifest import DISCARDED, SEALED, Manifest
from raypipe.store.reader import committed_rows
from raypipe.store.recover import Found, decide
from raypipe.store.schema import ShardSpec

_SHOWN = ("dtype", "grid", "bytes", "fingerprint", "identity", "token_layout", "provenance")
_SHOWN_SEALED = ("invalid_rows", "narrowing", "halved", "preallocation", "created", "sealed")


def find_shards(root: Path | str) -> list[Path]:
    """Final paths of all shards below ``root``, or of ``root`` itself, finished or not; sorted.

    MissingInput when ``root`` is not there.
    """
    root = Path(root)
    if root.suffix == ".npy" and not root.is_dir():
        return [root] if ShardPaths.of(root).manifest.exists() else []
    if not root.is_dir():
        raise MissingInput(f"folder {root} is not there; name a folder that holds stores")
    found = []
    for manifest in root.rglob("*.manifest.json"):
        shard = manifest.with_name(manifest.name.removesuffix(".manifest.json") + ".npy")
        if not manifest.name.startswith("."):
            found.append(shard)
    return sorted(found)


def describe(path: Path | str) -> dict[str, Any]:
    """The facts about one shard as plain JSON values; MissingInput when there is none.

    Keys: path, state, shape, rows_done, dtype, grid, bytes, fingerprint, identity, token_layout,
    provenance; for a sealed one invalid_rows, narrowing, halved and times; for an unfinished one
    owner (pid, host, run_id, command, started, alive: true, false, or null when not known).
    """
    paths = ShardPaths.of(Path(path))
    manifest = Manifest.read(paths.manifest)
    if manifest is None or manifest.state == DISCARDED:
        raise MissingInput(f"no store at {path}; name the .npy of a shard that raypipe wrote")
    facts = {"path": str(path), "state": manifest.state, "shape": list(manifest.shape)}
    facts |= {key: manifest.fields[key] for key in _SHOWN}
    if manifest.state == SEALED:
        shown = {key: manifest.fields.get(key) for key in _SHOWN_SEALED}
        return {**facts, "rows_done": manifest.shape[0], **shown}
    return {**facts, "rows_done": committed_rows(manifest), "owner": _owner(paths)}


def refusal(spec: ShardSpec) -> str | None:
    """Why `open_for_writing` would refuse ``spec`` for what lies at its place, or None."""
    try:
        decide(Found.at(spec.paths), spec, overwrite=False)
    except StoreError as error:
        return str(error)
    return None


def _owner(paths: ShardPaths) -> dict[str, Any] | None:
    owner = Owner.read(paths.owner)
    if owner is None:
        return None
    shown = ("pid", "host", "run_id", "command", "epoch", "started", "released")
    return {**{key: getattr(owner, key) for key in shown}, "alive": owner.alive}
