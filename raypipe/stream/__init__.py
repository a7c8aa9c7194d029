"""The order of training rows, and the rows themselves: a seeded plan of indices, then batches.

``permutation`` is a keyed shuffle that needs no list, and ``split`` holds rows out without one;
``plan`` makes of them the rows of every (epoch, step, rank); ``gather`` reads those rows from
``.npy`` files into reused buffers, one batch ahead, and ``reading`` lets rows come from anywhere
else. What the batches are for is `raypipe.train`'s; how the files came to be is `raypipe.store`'s.

``loader`` is all of it for a plain PyTorch loop, without Ray.

Importing this package imports neither torch nor ray: torch is loaded when a `Gatherer` is made, or
`FeatureLoader` or `FeatureDataset` first named.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raypipe.stream.gather import Gatherer
from raypipe.stream.layout import Join
from raypipe.stream.mapped import MappedRows
from raypipe.stream.permutation import KeyedPermutation
from raypipe.stream.plan import Cursor, StepSlice, StreamPlan, deal, split_micro
from raypipe.stream.reading import RowReader, Source
from raypipe.stream.rows import RowRange
from raypipe.stream.source import ArraySource
from raypipe.stream.split import SplitRows, split_rows
from raypipe.stream.window import ShuffleQuality, WindowShuffle, shuffle_quality

if TYPE_CHECKING:
    from raypipe.stream.loader import FeatureDataset, FeatureLoader

__all__ = [
    "ArraySource",
    "Cursor",
    "FeatureDataset",
    "FeatureLoader",
    "Gatherer",
    "Join",
    "KeyedPermutation",
    "MappedRows",
    "RowRange",
    "RowReader",
    "ShuffleQuality",
    "Source",
    "SplitRows",
    "StepSlice",
    "StreamPlan",
    "WindowShuffle",
    "deal",
    "shuffle_quality",
    "split_micro",
    "split_rows",
]


def __getattr__(name: str) -> Any:
    if name in ("FeatureDataset", "FeatureLoader"):
        from raypipe.stream import loader

        return getattr(loader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
