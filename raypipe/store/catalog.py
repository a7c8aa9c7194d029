"""Where copies of a store lie: ``train.places.json`` beside it, a few lines of JSON.

A reader on a node chooses the copy of that node by (node id, fingerprint), before anything is
opened. A copy that is listed and not there is an error, not a reason to read elsewhere in silence:
the run would crawl over the network and nobody would know. `replicate` writes the entries.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from raypipe.errors import ConfigError, MissingInput, StoreCorrupt, StoreError
from raypipe.store.durable import write_atomic
from raypipe.store.flocks import held
from raypipe.store.layout import ShardPaths
from raypipe.store.reader import FeatureStore, StoreLocator

_FORMAT, _VERSION = "raypipe-places", 1
_PATIENCE_S = 30.0  # many nodes may copy one store at the same time; an entry takes milliseconds


@dataclass(frozen=True, order=True)
class Place:
    """A copy: ``path`` as the node ``node`` sees it."""

    node: str
    path: Path


def this_node() -> str:
    """The id of this node: RAYPIPE_NODE, else its host name. Ray's own ids last one session only,
    an entry on the disk outlives them.
    """
    return os.environ.get("RAYPIPE_NODE") or platform.node()


def places_of(store: Path, fingerprint: str) -> tuple[Place, ...]:
    """Copies of the store ``fingerprint`` at ``store``, sorted; none when those listed are of what
    lay there before. Raises StoreCorrupt for a file that is no catalog.
    """
    file = ShardPaths.of(store).places
    try:
        fields = json.loads(file.read_bytes())
        if (fields["format"], fields["version"]) != (_FORMAT, _VERSION):
            raise StoreCorrupt(f"{file} is no catalog that this raypipe reads; move it away")
        listed = [Place(str(entry["node"]), Path(entry["path"])) for entry in fields["places"]]
        return tuple(sorted(listed)) if fields["fingerprint"] == fingerprint else ()
    except FileNotFoundError:
        return ()
    except (ValueError, KeyError, TypeError) as error:
        raise StoreCorrupt(f"{file} cannot be read ({error!r}); move it away") from None


def add_place(store: Path, fingerprint: str, place: Place) -> None:
    """Note a copy; entries of other fingerprints go. Raises StoreLocked after 30 s."""
    if not place.node or not place.path.is_absolute():
        raise ConfigError(f"{place} needs a node id and an absolute path")
    _change(store, fingerprint, add=[place])


def remove_place(store: Path, fingerprint: str, place: Place) -> None:
    """Forget a copy; one that is not listed is no error."""
    _change(store, fingerprint, drop=[place])


def _change(
    store: Path, fingerprint: str, *, add: Iterable[Place] = (), drop: Iterable[Place] = ()
) -> None:
    file = ShardPaths.of(store).places
    busy = f"{file} is being changed by others for more than {_PATIENCE_S:.0f} s; try again"
    with held(file.with_name(f".{file.name}.lock"), busy, _PATIENCE_S):
        places = ({*places_of(store, fingerprint)} - {*drop}) | {*add}
        fields = {
            "format": _FORMAT,
            "version": _VERSION,
            "fingerprint": fingerprint,
            "places": [{"node": p.node, "path": str(p.path)} for p in sorted(places)],
        }
        write_atomic(file, json.dumps(fields, indent=1).encode() + b"\n")


def place_on(store: Path, fingerprint: str, node: str) -> Place | None:
    """The copy that lies on ``node``, the first by path when there are several; None without one.
    Nothing is opened.
    """
    return next((place for place in places_of(store, fingerprint) if place.node == node), None)


def locate(store: Path, node: str | None = None) -> StoreLocator:
    """The locator that a reader on ``node`` (by default this one) shall open.

    The copy on that node with ``.node`` set, else the store itself. For this node the copy is
    opened: StoreError says so when the catalog names one that is gone or is another store.
    """
    opened = FeatureStore.open(store)
    wanted = this_node() if node is None else node
    place = place_on(store, opened.fingerprint, wanted)
    if place is None:
        return opened.locator()
    if wanted != this_node():  # that disk is not ours to look at; the node itself will
        here = opened.locator(place.node)
        return StoreLocator(
            path=place.path,
            dtype=here.dtype,
            shape=here.shape,
            offset=here.offset,
            node=here.node,
            fingerprint=here.fingerprint,
        )
    return _open_listed(store, opened.fingerprint, place).locator(place.node)


def _open_listed(store: Path, fingerprint: str, place: Place) -> FeatureStore:
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
