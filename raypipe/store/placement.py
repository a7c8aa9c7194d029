"""Which way a reader on a node comes to a store's rows: decided by names, before a file is opened.

A `Placement` is made once, by the driver, and travels to the readers; each asks it for the way from
its own node. What the catalog says is `raypipe.store.catalog`'s, rows of another node's disk are
brought by `raypipe.cluster.remote_rows`, where there is Ray (`Placement.at_hand`: where there is none).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raypipe.errors import StoreError
from raypipe.store.catalog import Place, elsewhere, open_copy, read_catalog, this_node
from raypipe.store.layout import ShardPaths
from raypipe.store.placed import PlacedStore
from raypipe.store.reader import FeatureStore

#: shared: the source's own path. local: a copy on this node's disk. remote: other nodes' disks.
Kind = Literal["shared", "local", "remote"]


@dataclass(frozen=True)
class Way:
    """``places``: the one to open here (shared, local), or all that hold the rows (remote), the one
    to ask first in front.
    """

    kind: Kind
    places: tuple[Place, ...]

    @property
    def words(self) -> str:
        """For people: ``local copy /nvme/train.npy``, ``rows of /data/lh.npy from node B``."""
        first = self.places[0]
        if self.kind == "remote":
            return f"rows of {first.path} from node {first.node}"
        return f"{'local copy' if self.kind == 'local' else 'shared'} {first.path}"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the rows named by ``path`` lie: on every node under that path (``shared``), and in
    copies on nodes' disks. ``listed``: by a catalog, which lists stores only.
    """

    path: Path
    fingerprint: str = ""
    shared: bool = True
    places: tuple[Place, ...] = ()
    listed: bool = False

    @classmethod
    def of(cls, path: Path, fingerprint: str = "", node: str = "") -> Placement:
        """That of a source; ``node``: whose disk ``path`` is on, "" for a shared one.

        Reads the catalog beside ``path``, where there is one, and nothing else. Raises StoreCorrupt,
        and StoreError when a store that is not shared was replaced since the source was made.
        """
        if node:
            return cls(
                path=path, fingerprint=fingerprint, shared=False, places=(Place(node, path),)
            )
        # Only stores have catalogs, and all of them are .npy.
        catalog = read_catalog(path) if path.suffix == ".npy" and path.stem else None
        if catalog is None:
            return cls(path=path, fingerprint=fingerprint)
        if catalog.fingerprint != fingerprint:
            if catalog.shared:  # it lists copies of what lay here before
                return cls(path=path, fingerprint=fingerprint)
            raise StoreError(
                f"{ShardPaths.of(path).places} is of another store now ({catalog.fingerprint[:12]}, "
                f"expected {fingerprint[:12] or 'none'}); start the run anew, or declare the store again"
            )
        if not (catalog.shared or catalog.places):
            raise StoreError(
                f"{ShardPaths.of(path).places} names no node that has the store, and says that it is "
                "not shared; declare it on the node that has it: raypipe store place"
            )
        return cls(
            path=path,
            fingerprint=fingerprint,
            shared=catalog.shared,
            places=catalog.places,
            listed=True,
        )

    def way(self, node: str, turn: int = 0) -> Way:
        """The way from ``node``: its own copy, else the shared path, else other nodes' disks.

        turn : any number of the reader; readers of other turns ask other copies first.
        """
        here = next((place for place in self.places if place.node == node), None)
        if here is not None:
            return Way("local", (here,))
        if self.shared:
            return Way("shared", (Place("", self.path),))
        first = turn % len(self.places)
        return Way("remote", self.places[first:] + self.places[:first])

    def at_hand(self) -> Way:
        """The way from this node where nobody brings rows: its own copy, checked, or the shared path.

        Raises StoreError, which names the nodes, when there is neither; and as `check`.
        """
        way = self.way(this_node())
        if way.kind == "remote":
            raise elsewhere(self.path, way.places, this_node())
        if way.kind == "local":
            self.check(way.places[0])
        return way

    def check(self, place: Place) -> None:
        """On the node of ``place``: raise StoreError unless it is a sealed copy of the store.

        A plain file that a source placed itself is checked when it is mapped.
        """
        plain = place.path.suffix != ".npy" or not ShardPaths.of(place.path).manifest.exists()
        if self.listed or not plain:
            open_copy(self.path, self.fingerprint, place)


def open_or_placed(path: Path) -> FeatureStore | PlacedStore:
    """The store at ``path``; where that stands for one on nodes' disks, what its catalog says of it.

    Raises as `FeatureStore.open`, or as `PlacedStore.open`.
    """
    catalog = read_catalog(path)
    if catalog is None or catalog.contents is None or ShardPaths.of(path).manifest.exists():
        return FeatureStore.open(path)
    return PlacedStore.open(catalog.contents)


def in_words(ways: Mapping[str, Way]) -> str:
    """The ways from this node to each source, for people: one line; "" when all are simply shared."""
    if all(way.kind == "shared" for way in ways.values()):
        return ""
    listed = "; ".join(f"{name}: {way.words}" for name, way in ways.items())
    return f"on node {this_node()}, {listed}"
