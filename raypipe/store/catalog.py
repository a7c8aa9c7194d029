"""Where a store lies: ``train.places.json`` beside it, a few lines of JSON.

It lists copies on the disks of nodes (`replicate` writes these), and may say that the store's own
path is nowhere but on such disks (`declare`): then it holds what a driver has to know of the store
too (shape, dtype, fingerprint; a note beside it says what the rows are: `placed`), and stands for it
on a folder that all nodes see.

A reader chooses by (node id, fingerprint), before anything is opened: `raypipe.store.placement`. A
copy that is listed and not there is an error, not a reason to read elsewhere in silence: the run
would crawl over the network and nobody would know.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raypipe.errors import ConfigError, MissingInput, StoreCorrupt, StoreError
from raypipe.store.durable import write_atomic
from raypipe.store.flocks import held
from raypipe.store.layout import ShardPaths
from raypipe.store.placed import write_note
from raypipe.store.reader import FeatureStore, StoreLocator

# It reads the source as a file: a store on another node's disk only it cannot bring.
REPLICATE = "raypipe store replicate, on a node that sees both"
_FORMAT, _VERSION = "raypipe-places", 1
_PATIENCE_S = 30.0  # many nodes may copy one store at the same time; an entry takes milliseconds


@dataclass(frozen=True, order=True)
class Place:
    """A copy: ``path`` as the node ``node`` sees it."""

    node: str
    path: Path


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """What the file says of the store ``fingerprint``.

    shared : whether the store's own path is good on every node; contents : what the store is, its
    path the one that stands for it; always there when it is not shared.
    """

    fingerprint: str
    places: tuple[Place, ...] = ()
    shared: bool = True
    contents: StoreLocator | None = None


def this_node() -> str:
    """The id of this node: RAYPIPE_NODE, else its host name. Ray's own ids last one session only,
    an entry on the disk outlives them.
    """
    return os.environ.get("RAYPIPE_NODE") or platform.node()


def read_catalog(store: Path) -> Catalog | None:
    """The catalog of ``store``, whose file need not be here; None without one.

    Raises StoreCorrupt for a file that is no catalog.
    """
    file = ShardPaths.of(store).places
    try:
        fields = json.loads(file.read_bytes())
        if (fields["format"], fields["version"]) != (_FORMAT, _VERSION):
            raise StoreCorrupt(f"{file} is no catalog that this raypipe reads; move it away")
        return _parsed(store, fields)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreCorrupt(f"{file} cannot be read ({error!r}); move it away") from None


def _parsed(store: Path, fields: dict[str, Any]) -> Catalog:
    places = (Place(str(entry["node"]), Path(entry["path"])) for entry in fields["places"])
    shared, fingerprint = bool(fields.get("shared", True)), str(fields["fingerprint"])
    contents = None
    if not shared:
        contents = StoreLocator(
            path=store.absolute(),
            dtype=str(fields["dtype"]),
            shape=tuple(int(n) for n in fields["shape"]),
            offset=int(fields["offset"]),
            node="",
            fingerprint=fingerprint,
        )
    return Catalog(
        fingerprint=fingerprint, places=tuple(sorted(places)), shared=shared, contents=contents
    )


def places_of(store: Path, fingerprint: str) -> tuple[Place, ...]:
    """Copies of the store ``fingerprint`` at ``store``, sorted; none when those listed are of what
    lay there before. Raises StoreCorrupt for a file that is no catalog.
    """
    catalog = read_catalog(store)
    return catalog.places if catalog and catalog.fingerprint == fingerprint else ()


def add_place(store: Path, fingerprint: str, place: Place) -> None:
    """Note a copy; entries of other fingerprints go. Raises StoreLocked after 30 s."""
    _check(place)
    _change(store, fingerprint, lambda old: replace(old, places=(*old.places, place)))


def remove_place(store: Path, fingerprint: str, place: Place) -> None:
    """Forget a copy; one that is not listed is no error."""

    def without(old: Catalog) -> Catalog:
        return replace(old, places=tuple(p for p in old.places if p != place))

    _change(store, fingerprint, without)


def declare(store: FeatureStore, node: str | None = None, at: Path | None = None) -> Path:
    """Say that ``store`` lies on the disk of ``node`` (by default this one), not where all see it.

    ``at``: the path that stands for it from now on, in a folder that every node sees (the catalog and
    its note are put there, no rows); by default its own, where only this node finds the catalog: enough
    for a driver that runs here. Declared by several nodes at one ``at``, all are listed. Returns
    the path that stands for it. Raises ConfigError when another file lies at ``at``.
    """
    own = store.path.absolute()
    path = (at or own).absolute()
    if path != own and path.exists():
        raise ConfigError(
            f"{path} is a file, and would be passed over for the copy on one node's disk; give a path "
            "without one, or list the copy with raypipe store replicate"
        )
    place = Place(this_node() if node is None else node, own)
    _check(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = replace(store.locator(), path=path)

    def unshared(old: Catalog) -> Catalog:
        return replace(old, places=(*old.places, place), shared=False, contents=contents)

    def note() -> None:
        if path != own:  # beside the store itself its own index says it
            write_note(store, path)

    _change(path, store.fingerprint, unshared, note)
    return path


def _check(place: Place) -> None:
    if not place.node or not place.path.is_absolute():
        raise ConfigError(f"{place} needs a node id and an absolute path")


def _change(
    store: Path,
    fingerprint: str,
    change: Callable[[Catalog], Catalog],
    before: Callable[[], None] = lambda: None,
) -> None:
    """``before``: called under the lock when nothing speaks against the change."""
    file = ShardPaths.of(store).places
    busy = f"{file} is being changed by others for more than {_PATIENCE_S:.0f} s; try again"
    with held(file.with_name(f".{file.name}.lock"), busy, _PATIENCE_S):
        found = read_catalog(store)
        known = found is not None and found.fingerprint == fingerprint
        new = change(found if found and known else Catalog(fingerprint=fingerprint))
        if found and not known and not found.shared:
            _check_superseded(file, found, new)
        before()
        fields: dict[str, Any] = {
            "format": _FORMAT,
            "version": _VERSION,
            "fingerprint": fingerprint,
            "places": [{"node": p.node, "path": str(p.path)} for p in sorted(set(new.places))],
        }
        if new.contents is not None:
            fields |= {
                "shared": new.shared,
                "dtype": new.contents.dtype,
                "shape": list(new.contents.shape),
                "offset": new.contents.offset,
            }
        write_atomic(file, json.dumps(fields, indent=1).encode() + b"\n")


def _check_superseded(file: Path, found: Catalog, new: Catalog) -> None:
    """Only who makes a store anew where it lay may replace what ``file`` says of the old one."""
    others = sorted(set(found.places) - set(new.places))
    if others or new.shared:
        raise ConfigError(
            f"{file} is of another store ({found.fingerprint[:12]}, this one is "
            f"{new.fingerprint[:12]}), which lies on {', '.join(p.node for p in others) or 'nodes'}; "
            "give this store a catalog of its own, or remove that file if the other is out of date"
        )


def place_on(store: Path, fingerprint: str, node: str) -> Place | None:
    """The copy that lies on ``node``, the first by path when there are several; None without one.
    Nothing is opened.
    """
    return next((place for place in places_of(store, fingerprint) if place.node == node), None)


def stand_in(store: Path) -> StoreLocator:
    """The locator that stands for ``store`` wherever it lies: what a task is planned from, and each
    reader resolves where it is. Nothing is opened when the catalog says that it is not shared.

    Raises as `FeatureStore.open` when it is.
    """
    catalog = read_catalog(store)
    if catalog is not None and catalog.contents is not None:
        return catalog.contents
    return FeatureStore.open(store).locator()


def locate(store: Path, node: str | None = None) -> StoreLocator:
    """The locator that a reader on ``node`` (by default this one) shall open.

    The copy on that node with ``.node`` set, else the store itself: for reading there, not for a task
    that workers elsewhere shall read (`stand_in`). For this node the copy is
    opened: StoreError says so when the catalog names one that is gone or is another store, or when
    the store lies on other nodes' disks only.
    """
    whole = stand_in(store)
    wanted = this_node() if node is None else node
    place = place_on(store, whole.fingerprint, wanted)
    if place is None:
        catalog = read_catalog(store)
        if catalog is not None and not catalog.shared:
            raise elsewhere(store, catalog.places, wanted)
        return whole
    # A disk of another node is not ours to look at; the node itself will.
    if wanted == this_node():
        open_copy(store, whole.fingerprint, place)
    return replace(whole, path=place.path, node=place.node)


def elsewhere(path: Path, places: Iterable[Place], node: str) -> StoreError:
    """What a reader on ``node`` is told of rows that lie in ``places`` only, where nobody brings them."""
    held = ", ".join(sorted({place.node for place in places})) or "no node"
    return StoreError(
        f"{path} lies on the disks of {held}, not of {node} (a node's id is its RAYPIPE_NODE, or host "
        f"name); copy it to a disk that this node sees ({REPLICATE}), or "
        "train by --runner ray, which reads it from where it is"
    )


def open_copy(store: Path, fingerprint: str, place: Place) -> FeatureStore:
    """The copy of ``store`` that the catalog lists on this node.

    Raises StoreError, which names node and path, when it is gone, damaged, or another store.
    """
    again = f"raypipe store replicate {store} --to {place.path.parent}, or remove its entry"
    try:
        copy = FeatureStore.open(place.path)
    except (MissingInput, StoreError) as error:
        raise StoreError(
            f"{ShardPaths.of(store).places} lists a copy on {place.node} that cannot be used "
            f"({error}); {again}"
        ) from error
    if copy.fingerprint != fingerprint:
        raise StoreError(
            f"{place.path} on {place.node} is another store now ({copy.fingerprint[:12]}, listed "
            f"{fingerprint[:12]}); {again}"
        )
    return copy
