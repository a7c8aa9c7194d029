"""Opening sources where no cluster brings rows: a copy on this node's disk, else the shared path.

Which of them is said by the catalog, where there is one (`raypipe.store.placement`), never by an open
that fails: rows that lie on other nodes' disks only are one error that names the nodes. With Ray,
``raypipe.cluster.shards`` opens sources in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from raypipe.store import this_node
from raypipe.store.placement import Placement, Way, in_words
from raypipe.stream.mapped import MappedRows
from raypipe.stream.reading import RowReader, Source
from raypipe.stream.source import ArraySource


def open_at_hand(source: Source) -> MappedRows | RowReader:
    """Open ``source`` the way there is from this node. Raises StoreError when it lies elsewhere, or a
    copy that is listed here is not what it should be; and as `Source.open`.
    """
    if not isinstance(source, ArraySource):
        return source.open()
    way = _way(source)
    if way.kind == "shared":
        return source.open()
    (place,) = way.places
    return replace(source, path=place.path, node=place.node).open()


def ways_at_hand(sources: Mapping[str, Source]) -> str:
    """Which way `open_at_hand` takes to each of ``sources``, for people; "" when all are simply
    shared. Raises StoreError as that would: nothing but a copy's manifest is opened.
    """
    files = {name: source for name, source in sources.items() if isinstance(source, ArraySource)}
    return in_words({name: _way(source) for name, source in files.items()})


def far_sources(sources: Mapping[str, Source]) -> tuple[str, ...]:
    """Names of those that lie on other nodes' disks only. Nothing is opened, nor checked."""
    return tuple(
        name
        for name, source in sources.items()
        if isinstance(source, ArraySource) and _placement(source).way(this_node()).kind == "remote"
    )


def _way(source: ArraySource) -> Way:
    return _placement(source).at_hand()


def _placement(source: ArraySource) -> Placement:
    return Placement.of(source.path, source.fingerprint, source.node)
