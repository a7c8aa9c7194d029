"""``fit_glm``: a general linear model of every voxel, a block at a time, and its contrasts.

Equal to nilearn's FirstLevelModel, which holds all series and residuals of a run in float64; here a
run costs the budget, however many voxels it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import InputError
from raypipe.fmri.glm.blocks import BUDGET_BYTES, SeriesBlock, series_blocks, voxels_a_block
from raypipe.fmri.glm.config import GlmConfig
from raypipe.fmri.glm.contrasts import Asked, GlmResult, StatMap, Weighed, of_run, weigh
from raypipe.fmri.glm.designs import DesignMatrix
from raypipe.fmri.glm.noise_fit import fit_block
from raypipe.fmri.glm.projection import Projection
from raypipe.fmri.sources import SeriesSource, Voxels

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False, kw_only=True)
class GlmRun:
    """A run to be modelled.

    design : of all volumes, (T, p); kept : (m,) volumes that are not scrubbed, None for all
    """

    series: SeriesSource
    design: DesignMatrix
    kept: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        n = len(self.design.matrix)
        if n != self.series.n_volumes:
            raise InputError(
                f"the design has {n} volumes, the series {self.series.n_volumes}; they are of "
                "different runs"
            )

    @property
    def modelled(self) -> DesignMatrix:
        """The design of the volumes that are kept."""
        return self.design if self.kept is None else self.design.rows(self.kept)


def fit_glm(
    runs: Sequence[GlmRun],
    contrasts: Mapping[str, Asked | list[Asked]],
    config: GlmConfig,
    *,
    budget_bytes: int = BUDGET_BYTES,
) -> GlmResult:
    """Maps of ``contrasts`` over all runs (fixed effects), of the voxels that all runs have.

    contrasts : name -> expression of column names, weights (p,), or (k, p) for F; or a list, one a run
    budget_bytes : for the work; the maps, two float64 a contrast and voxel, come on top
    """
    if not contrasts:
        raise InputError("no contrast is asked for; give e.g. face minus house as 'face - house'")
    voxels = common_voxels([run.series for run in runs])
    sums = {name: _Sum() for name in contrasts}
    flags = np.zeros((2, len(voxels)), bool)
    for number, run in enumerate(runs):
        projection = Projection.of(run.modelled.matrix)
        asked = _asked(contrasts, number, len(runs), run.modelled, projection)
        for weighed in asked:
            sums[weighed.name].open(weighed, len(voxels), projection.dof)
        step = voxels_a_block(
            len(projection.q), projection.q.shape[1], 4 * len(asked), budget_bytes
        )
        mean = _residual_mean(run, voxels, step, projection, config)
        for block in series_blocks(run.series, voxels, step, config, run.kept):
            flags[:, block.place] |= (block.constant, block.not_finite)
            _answer(block, asked, sums, projection, config, mean)
    return GlmResult(
        voxels=voxels,
        maps={name: total.close(name, flags[1]) for name, total in sums.items()},
        constant=flags[0],
        not_finite=flags[1],
        n_runs=len(runs),
    )


def common_voxels(sources: Sequence[SeriesSource]) -> Voxels:
    """The voxels that all runs have; raises InputError for none."""
    if not sources:
        raise InputError("no run to model; give one or more")
    common: Voxels = reduce(np.intersect1d, [source.voxels for source in sources])
    if common.size == 0:
        raise InputError("the runs have no voxel in common; they are on different grids")
    return common


def _asked(
    contrasts: Mapping[str, Asked | list[Asked]],
    run: int,
    n_runs: int,
    design: DesignMatrix,
    projection: Projection,
) -> list[Weighed]:
    """The contrasts of this run that are not 0."""
    weighed = (
        weigh(name, of_run(one, run, n_runs, name), run, design, projection)
        for name, one in contrasts.items()
    )
    return [one for one in weighed if one is not None]


def _answer(
    block: SeriesBlock,
    asked: Sequence[Weighed],
    sums: Mapping[str, _Sum],
    projection: Projection,
    config: GlmConfig,
    mean: float,
) -> None:
    places = block.rows
    for alike in fit_block(block.values, projection, config, mean):
        for one in asked:
            effect, variance = one.answer(alike.theta, alike.dispersion, alike.inverse)
            sums[one.name].add(places[alike.rows], effect, variance)


def _residual_mean(
    run: GlmRun, voxels: Voxels, step: int, projection: Projection, config: GlmConfig
) -> float:
    """The mean residual of all voxels and volumes; 0, without reading, where a constant is modelled."""
    if projection.has_constant or config.noise == "ols":
        return 0.0
    parts = [
        (block.values.sum(axis=0), len(block.values)) for block in _all(run, voxels, step, config)
    ]
    count = sum(n for _, n in parts)
    if count == 0:
        return 0.0
    total = np.sum([part for part, _ in parts], axis=0)[np.newaxis] / count
    return float(projection.split(total)[1].mean())


def _all(run: GlmRun, voxels: Voxels, step: int, config: GlmConfig) -> Iterator[SeriesBlock]:
    return series_blocks(run.series, voxels, step, config, run.kept)


class _Sum:
    """A contrast's effects and variances, summed over runs."""

    def __init__(self) -> None:
        self._effect = self._variance = np.zeros(0)
        self._kind, self._runs, self._dof = "", 0, 0.0

    def open(self, one: Weighed, n_voxels: int, dof: int) -> None:
        """A run begins."""
        shape = (n_voxels,) if one.kind == "t" else (len(one.coordinates), n_voxels)
        if self._runs == 0:
            self._effect, self._variance = np.zeros(shape), np.zeros(n_voxels)
        elif self._effect.shape != shape:
            raise InputError(
                f"contrast {one.name} is of {len(self._effect.shape)} and {len(shape)} dimensions in "
                "different runs; give weights of one shape"
            )
        self._kind, self._runs, self._dof = one.kind, self._runs + 1, self._dof + dof

    def add(self, places: Voxels, effect: Floats, variance: Floats) -> None:
        """effect : (m,) or (k, m); variance : (m,)."""
        self._effect[..., places] += effect
        self._variance[places] += variance

    def close(self, name: str, not_finite: NDArray[np.bool_]) -> StatMap:
        """The mean effect over runs, and its variance."""
        if self._runs == 0:
            raise InputError(f"contrast {name} is 0 in all runs; give it weights")
        effect, variance = self._effect / self._runs, self._variance / self._runs**2
        effect[..., not_finite] = np.nan
        variance[not_finite] = np.nan
        return StatMap(name=name, kind=self._kind, effect=effect, variance=variance, dof=self._dof)
