"""``raypipe store place``: say that stores lie on one node's disk, for a training on several nodes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from raypipe.errors import ConfigError, MissingInput
from raypipe.store.catalog import declare, this_node
from raypipe.store.info import find_shards
from raypipe.store.reader import FeatureStore


@dataclass(frozen=True, kw_only=True)
class PlaceConfig:
    """Note that finished stores lie on this node's disk only; nothing is copied.

    Workers elsewhere then have their rows brought by Ray. Run it on each node that has a copy.
    """

    store: Positional[Path]
    """A shard's .npy file, or a folder: then every shard below it."""
    catalog: Path | None = None
    """A folder that all nodes see, for the notes (small files); by default beside the stores, where
    only this node finds them: enough for a driver that runs here."""
    node: str | None = None
    """Id of the node that the disk belongs to; by default RAYPIPE_NODE or this host's name."""

    def __post_init__(self) -> None:
        if self.node == "":
            raise ConfigError("--node is empty; leave it out for this host's name")


def place(cfg: PlaceConfig) -> None:
    """Write the notes; a line a shard. Raises MissingInput when there is none."""
    shards = find_shards(cfg.store)
    if not shards:
        raise MissingInput(
            f"{cfg.store}: no store there; give a shard's .npy or a folder of stores"
        )
    root = shards[0].parent if shards == [cfg.store] else cfg.store
    node = cfg.node or this_node()
    for shard in shards:
        at = cfg.catalog / shard.relative_to(root) if cfg.catalog else None
        print(f"{declare(FeatureStore.open(shard), node, at)}  on node {node}  {shard.absolute()}")
