"""The order of training rows, and the rows themselves: a seeded plan of indices, then batches.

``permutation`` is a keyed shuffle that needs no list; ``plan`` makes of it the rows of every
(epoch, step, rank); ``gather`` reads those rows from ``.npy`` maps into reused buffers, one batch
ahead. What the batches are for is `raypipe.train`'s; how the files came to be is `raypipe.store`'s.

Importing this package imports neither torch nor ray: torch is loaded when a `Gatherer` is made.
"""

from __future__ import annotations

from raypipe.stream.gather import Gatherer
from raypipe.stream.permutation import KeyedPermutation
from raypipe.stream.plan import Cursor, StepSlice, StreamPlan, deal, split_micro
from raypipe.stream.rows import RowRange
from raypipe.stream.source import ArraySource, MappedRows
from raypipe.stream.window import ShuffleQuality, WindowShuffle, shuffle_quality

__all__ = [
    "ArraySource",
    "Cursor",
    "Gatherer",
    "KeyedPermutation",
    "MappedRows",
    "RowRange",
    "ShuffleQuality",
    "StepSlice",
    "StreamPlan",
    "WindowShuffle",
    "deal",
    "shuffle_quality",
    "split_micro",
]
