"""Least squares separate: a model for each trial, without fitting one for each (Mumford 2012).

The model of trial i has its own columns X_i, those of the other trials, and the rest. Together with X_i,
"the other trials" and "all trials" span the same space, so all models of a run share a base B (all
conditions, confounds, drift) and differ by X_i only. By the block inverse a trial then costs one
projection: with B's fit known, only what X_i adds to B has to be solved, k x k for k columns a trial.

In symbols: fit = B b + X_i g; X_i = own, its condition's columns in B are raw sums, and a trial's raw
columns are own @ mix; so the trial's beta is g + mix @ (b of its condition). kappa below takes the first
component of the latter from coordinates in B.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from raypipe.errors import InputError
from raypipe.fmri.glm.config import GlmConfig
from raypipe.fmri.glm.designs import DesignMatrix
from raypipe.fmri.glm.noise import Bins, Moments, coefficient_bins, explained_wholly, moments
from raypipe.fmri.glm.projection import Projection, neighbours
from raypipe.fmri.glm.trials import EventColumns

Floats = NDArray[np.float64]

# What a trial adds to its base, squared and relative to it, below which its model is not told apart.
_ADDS_NOTHING = 1e-10


@dataclass(frozen=True, eq=False)
class Separate:
    """The models of a run's m trials.

    base : of B; added : (m, T, k), X_i less its projection on B, 0 for the only trial of a condition
    within : (m, r, k) coordinates of X_i in B; kappa : (m, r)
    gram, lag : (m, k, k), added' added and added' (L + L') added
    """

    base: Projection
    added: Floats
    within: Floats
    kappa: Floats
    gram: Floats
    lag: Floats

    @classmethod
    def of(
        cls,
        columns: EventColumns,
        trials: NDArray[np.int64],
        nuisance: DesignMatrix,
        others: str,
    ) -> Separate:
        """others : "condition", one regressor for the other trials of each type; "all", one for all."""
        kinds = columns.kinds.astype(object)  # names of any length
        if others == "all":
            kinds[trials] = "all trials"
        groups = sorted(set(kinds.tolist()))
        k = columns.own.shape[2]
        sums = [columns.raw[kinds == group].sum(axis=0) for group in groups]
        base = Projection.of(np.column_stack((*sums, nuisance.matrix)))
        place = {group: slice(k * i, k * i + k) for i, group in enumerate(groups)}
        alone = np.array([np.count_nonzero(kinds == kinds[i]) == 1 for i in trials])
        own = columns.own[trials]
        within = np.einsum("tr,mtk->mrk", base.q, own)
        added = own - np.einsum("tr,mrk->mtk", base.q, within)
        added[alone] = 0.0
        _check(columns, trials, added, own, alone, base, [place[kinds[i]] for i in trials])
        rows = np.stack([base.back[place[kinds[i]]] for i in trials])  # (m, k, r)
        kappa = np.einsum("mk,mkr->mr", columns.mix[trials][:, 0], rows)
        return cls(
            base=base,
            added=added,
            within=within,
            kappa=kappa,
            gram=np.einsum("mtj,mtk->mjk", added, added),
            lag=np.einsum("mtj,mtk->mjk", added, _neighbours(added)),
        )

    def white(self) -> Floats:
        """(T, m): series @ this are the betas under white noise; one product for all trials."""
        weight = -np.einsum("mr,mrk->mk", self.kappa, self.within)
        weight[:, 0] += 1.0
        solved = np.einsum("mjk,mk->mj", _inverse(self.gram), weight)
        return (np.einsum("mtk,mk->mt", self.added, solved) + self.kappa @ self.base.q.T).T


def betas(model: Separate, values: Floats, config: GlmConfig) -> Floats:
    """values : (n, T) -> (n, m) betas of each trial's own model."""
    if config.noise == "ols":
        return values @ model.white()
    return _ar1(model, values, config)


def _ar1(model: Separate, values: Floats, config: GlmConfig) -> Floats:
    """Each model of each voxel has a noise coefficient of its own, that of its residuals."""
    theta, residual = model.base.split(values)
    sums = moments(residual)
    flat = model.added.transpose(1, 0, 2).reshape(len(model.base.q), -1)  # (T, m k)
    shape = (len(values), *model.added.shape[::2])  # (n, m, k)
    onto = (residual @ flat).reshape(shape)
    onto_lagged = (residual @ neighbours(flat)).reshape(shape)
    bins = _bins(model, values, sums, onto, onto_lagged, config)
    products = residual @ model.base.lagged
    out = np.empty(shape[:2])
    for number in np.unique(bins):
        # nearly all trials of a voxel share a few coefficients: whole voxels are worked out
        rows = np.flatnonzero((bins == number).any(axis=1))
        part = _OneNoise.of(model, number / config.bins).betas(
            theta[rows], products[rows], sums.last[rows], onto[rows], onto_lagged[rows]
        )
        here = bins[rows] == number
        out[rows] = np.where(here, part, out[rows])
    return out


def _bins(
    model: Separate,
    values: Floats,
    sums: Moments,
    onto: Floats,
    onto_lagged: Floats,
    config: GlmConfig,
) -> Bins:
    """(n, m), from the moments of each model's residuals: the base's less what the trial explains."""
    gamma = np.einsum("mjk,nmk->nmj", _inverse(model.gram), onto)
    square = sums.square[:, np.newaxis] - np.einsum("nmk,nmk->nm", gamma, onto)
    lagged = sums.lagged[:, np.newaxis] - np.einsum("nmk,nmk->nm", gamma, onto_lagged)
    lagged += 0.5 * np.einsum("nmj,mjk,nmk->nm", gamma, model.lag, gamma, optimize=True)
    square[explained_wholly(sums.square, values)] = 0.0
    return coefficient_bins(square, lagged, values.shape[1], config.bins)


@dataclass(frozen=True, eq=False)
class _OneNoise:
    """The models under one noise coefficient."""

    model: Separate
    rho: float
    inverse: Floats  # (r, r)
    cross: Floats  # (m, r, k), Q'V added
    solve: Floats  # (m, k, k)

    @classmethod
    def of(cls, model: Separate, rho: float) -> _OneNoise:
        base, last = model.base, model.added[:, -1]  # (m, k)
        inverse = linalg.inv(base.noise_gram(rho))
        cross = -rho * np.einsum("tr,mtk->mrk", base.lagged, model.added)
        cross -= rho**2 * base.q[-1][np.newaxis, :, np.newaxis] * last[:, np.newaxis]
        own = (1 + rho**2) * model.gram - rho * model.lag
        own -= rho**2 * last[:, :, np.newaxis] * last[:, np.newaxis]
        own -= np.einsum("mrj,rs,msk->mjk", cross, inverse, cross, optimize=True)
        return cls(model, rho, inverse, cross, _inverse(own))

    def betas(
        self, theta: Floats, products: Floats, last: Floats, onto: Floats, lagged: Floats
    ) -> Floats:
        """theta, products : (n, r) of the base's fit; last : (n,); onto, lagged : (n, m, k)."""
        rho, model = self.rho, self.model
        pull = -rho * products - rho**2 * np.outer(last, model.base.q[-1])  # Q'Ve, (n, r)
        solved = np.einsum("rs,msk->mrk", self.inverse, self.cross)
        right = (1 + rho**2) * onto - rho * lagged
        right -= rho**2 * last[:, np.newaxis, np.newaxis] * model.added[:, -1]
        right -= np.einsum("nr,mrk->nmk", pull, solved, optimize=True)
        gamma = np.einsum("mjk,nmk->nmj", self.solve, right)
        weight = -np.einsum("mr,mrk->mk", model.kappa, solved + model.within)
        weight[:, 0] += 1.0
        found: Floats = np.einsum("mk,nmk->nm", weight, gamma)
        return found + (theta + pull @ self.inverse) @ model.kappa.T


def _inverse(stack: Floats) -> Floats:
    """Inverse of each (k, k); 0 of 0, for trials that add nothing to the base."""
    out = np.zeros_like(stack)
    some = stack.any(axis=(1, 2))
    out[some] = np.linalg.inv(stack[some])
    return out


def _neighbours(added: Floats) -> Floats:
    return np.stack([neighbours(one) for one in added])


def _check(
    columns: EventColumns,
    trials: NDArray[np.int64],
    added: Floats,
    own: Floats,
    alone: NDArray[np.bool_],
    base: Projection,
    places: list[slice],
) -> None:
    """Raises InputError for a trial whose beta has no one answer."""
    left = np.einsum("mtk,mtk->mk", added, added) / np.einsum("mtk,mtk->mk", own, own)
    for i, (trial, place) in enumerate(zip(trials, places, strict=True)):
        contrast = np.zeros((1, base.n_columns))
        contrast[0, place] = columns.mix[trial, 0]
        if (left[i].min() < _ADDS_NOTHING and not alone[i]) or not base.estimable(contrast):
            raise InputError(
                f"trial {i} ({columns.kinds[trial]}) cannot be told from the rest of its model; two "
                "events at one time, or a confound that follows it"
            )
