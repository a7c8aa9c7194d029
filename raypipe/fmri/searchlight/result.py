"""Blocks' scores put together: a map of the brain, p values, and a NIfTI image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import InputError, UnknownName
from raypipe.fmri.maps import map_image
from raypipe.fmri.masks import Grid, Voxels
from raypipe.fmri.mvpa.permute import count_reached
from raypipe.fmri.searchlight.plan import SearchlightPlan
from raypipe.fmri.searchlight.score import BlockScores

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class SearchlightMap:
    """One value a centre. centres : (n,) flat indices, ascending; n_voxels : (n,) of each sphere.

    scores : score -> (n,); p : score -> (n,) of each sphere alone; p_corrected : score -> (n,) against
    the highest score of any sphere in each permutation (family-wise). p are empty without permutations.
    """

    grid: Grid
    radius_mm: float
    centres: Voxels
    n_voxels: NDArray[np.int64]
    scores: Mapping[str, Floats]
    p: Mapping[str, Floats]
    p_corrected: Mapping[str, Floats]
    n_permutations: int
    warnings: tuple[str, ...]

    def image(self, score: str, what: str = "scores") -> Any:
        """A NIfTI image of ``scores``, ``p`` or ``p_corrected``; 0 (p: 1) where there is no centre."""
        values = self._values(score, what)
        outside = 0.0 if what == "scores" else 1.0
        return map_image(values, self.centres, self.grid, outside=outside)

    def _values(self, score: str, what: str) -> Floats:
        known: dict[str, Mapping[str, Floats]] = {
            "scores": self.scores,
            "p": self.p,
            "p_corrected": self.p_corrected,
        }
        if what not in known:
            raise UnknownName.of("map", what, known)
        if score not in known[what]:
            raise UnknownName.of("score", score, known[what], f"{what} were made for these")
        return known[what][score]


def assemble(plan: SearchlightPlan, parts: Iterable[BlockScores]) -> SearchlightMap:
    """All blocks' scores, in any order; raises InputError when one is missing or twice there."""
    done = sorted(parts, key=lambda part: part.number)
    if [part.number for part in done] != list(range(len(plan))):
        raise InputError(
            f"{len(done)} blocks were given, the plan has {len(plan)}, each once; score the missing ones"
        )
    centres = np.concatenate([part.centres for part in done])
    order = np.argsort(centres)
    names = list(done[0].scores)

    def joined(field: Callable[[BlockScores], Mapping[str, NDArray[Any]]], name: str) -> Any:
        return np.concatenate([field(part)[name] for part in done])[order]

    scores = {name: joined(lambda part: part.scores, name) for name in names}
    highest = {name: np.max([part.null_max[name] for part in done], axis=0) for name in names}
    n = len(highest[names[0]])
    reached = {name: joined(lambda part: part.reached, name) for name in names} if n else {}
    return SearchlightMap(
        grid=plan.grid,
        radius_mm=plan.radius_mm,
        centres=centres[order],
        n_voxels=np.concatenate([part.n_voxels for part in done])[order],
        scores=scores,
        p={name: _p(count, n, scores[name]) for name, count in reached.items()},
        p_corrected={
            name: _p(_reached_by_highest(scores[name], highest[name]), n, scores[name])
            for name in reached
        },
        n_permutations=n,
        warnings=tuple(sorted({part.warning for part in done if part.warning}))[:1],
    )


def _p(reached: NDArray[np.int64], n: int, scores: Floats) -> Floats:
    """(1 + reached) / (1 + n); NaN where there is no score."""
    p: Floats = np.where(np.isnan(scores), np.nan, (1 + reached) / (1 + n))
    return p


def _reached_by_highest(scores: Floats, highest: Floats) -> NDArray[np.int64]:
    """(n,) permutations whose highest score reaches each; a thousand spheres at a time."""
    parts = [
        count_reached(part, np.broadcast_to(highest, (len(part), len(highest))))
        for part in np.array_split(scores, max(1, len(scores) // 1000))
    ]
    return np.concatenate(parts)
