"""Inference on images of any size, tile by tile, equal to that of the whole image.

Covers the grid (``grid``), how far a model looks (``field``), blending where exactness is impossible
(``blend``), and the engine that reads, computes, writes and resumes (``engine``; the way in for most
is ``large``). Reading files is ``raypipe.read``; locks and journals are ``raypipe.store``'s.
"""

from __future__ import annotations

from raypipe.tile.config import TileConfig
from raypipe.tile.engine import Inferred, infer
from raypipe.tile.field import Field, measure, stated
from raypipe.tile.grid import AxisGrid, Tile, TileGrid
from raypipe.tile.large import process_large_image
from raypipe.tile.source import ArraySource, Source, StackSource, open_source

__all__ = [
    "ArraySource",
    "AxisGrid",
    "Field",
    "Inferred",
    "Source",
    "StackSource",
    "Tile",
    "TileConfig",
    "TileGrid",
    "infer",
    "measure",
    "open_source",
    "process_large_image",
    "stated",
]
