"""Searchlight: what can be decoded around every voxel, out of core and in blocks of work.

``geometry.py`` says which voxels a sphere has; ``plan.py`` cuts the centres into blocks within a byte
budget; ``score.py`` scores a block, anywhere; ``gram.py`` walks from sphere to sphere; ``result.py``
puts blocks together. ``searchlight`` does all of it in this process; a runner hands the same blocks to
``SearchlightWorker``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from raypipe.errors import RaypipeWarning
from raypipe.fmri.masks import Grid, Voxels
from raypipe.fmri.mvpa import Design
from raypipe.fmri.mvpa.estimators import solver_squares
from raypipe.fmri.searchlight.plan import (
    Block,
    SearchlightConfig,
    SearchlightPlan,
    plan_searchlight,
)
from raypipe.fmri.searchlight.result import SearchlightMap, assemble
from raypipe.fmri.searchlight.score import BlockScores, SearchlightWorker, score_block
from raypipe.fmri.sources import SeriesSource

__all__ = [
    "Block",
    "BlockScores",
    "SearchlightConfig",
    "SearchlightMap",
    "SearchlightPlan",
    "SearchlightWorker",
    "assemble",
    "plan_searchlight",
    "score_block",
    "searchlight",
]


def searchlight(
    reader: SeriesSource,
    grid: Grid,
    design: Design,
    config: SearchlightConfig,
    *,
    mask: Voxels | None = None,
    centres: Voxels | None = None,
    done: Callable[[int, int], None] = lambda finished, of: None,
) -> SearchlightMap:
    """Scores of spheres around ``centres`` (all voxels for None), block after block in this process.

    mask : voxels that spheres are made of, all that the reader has for None
    done : told after each block (finished, of)
    """
    plan = plan_searchlight(
        reader.voxels if mask is None else mask,
        grid,
        config,
        n_volumes=reader.n_volumes,
        n_samples=len(design),
        centres=centres,
        squares=solver_squares(config.decode.model, len(design.classes)),
    )
    worker = SearchlightWorker(reader, design, config)
    parts = []
    for block in plan.blocks():
        parts.append(worker(block))
        done(len(parts), len(plan))
    found = assemble(plan, parts)
    for text in found.warnings:
        warnings.warn(text, RaypipeWarning, stacklevel=2)
    return found
