"""Feature stores: memory-mapped ``.npy`` shards that survive a crash at any moment.

Writing: the driver opens a `ShardSpec` with `open_for_writing`, workers fill it through
`ShardWriter`, the driver seals it. Reading: `FeatureStore`, or plain ``np.load``. Plain NumPy:
neither torch nor ray is loaded here. Start in `run` (the order of all steps) or `layout` (the
files). Making features is `backbone`'s business, feeding them to training is `stream`'s.
"""

from __future__ import annotations

from raypipe.store.adoption import Adoption, adopt, plan_adoption
from raypipe.store.catalog import (
    Place,
    add_place,
    declare,
    locate,
    place_on,
    places_of,
    stand_in,
    this_node,
)
from raypipe.store.discard import discard_store
from raypipe.store.export import Export, export_store, plan_export
from raypipe.store.info import describe, find_shards, refusal
from raypipe.store.journal import CommitRecord, RowSource
from raypipe.store.narrow import from_bfloat16, to_bfloat16
from raypipe.store.placed import PlacedStore
from raypipe.store.placement import Placement, Way, open_or_placed
from raypipe.store.reader import FeatureStore, StoreLocator, open_locator
from raypipe.store.recover import space_needed
from raypipe.store.replicate import Replica, plan_replicas, replicate_store, require_room
from raypipe.store.run import Progress, ShardRun, open_for_writing
from raypipe.store.schema import ShardSpec
from raypipe.store.space import require_space
from raypipe.store.verify import VerifyReport, verify
from raypipe.store.writer import ShardWriter, WriterTarget

__all__ = [
    "Adoption",
    "CommitRecord",
    "Export",
    "FeatureStore",
    "Place",
    "PlacedStore",
    "Placement",
    "Progress",
    "Replica",
    "RowSource",
    "ShardRun",
    "ShardSpec",
    "ShardWriter",
    "StoreLocator",
    "VerifyReport",
    "Way",
    "WriterTarget",
    "add_place",
    "adopt",
    "declare",
    "describe",
    "discard_store",
    "export_store",
    "find_shards",
    "from_bfloat16",
    "locate",
    "open_for_writing",
    "open_locator",
    "open_or_placed",
    "place_on",
    "places_of",
    "plan_adoption",
    "plan_export",
    "plan_replicas",
    "refusal",
    "replicate_store",
    "require_room",
    "require_space",
    "space_needed",
    "stand_in",
    "this_node",
    "to_bfloat16",
    "verify",
]
