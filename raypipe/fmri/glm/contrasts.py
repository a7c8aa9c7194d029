"""What is asked of a fitted model, and the maps that answer it.

A contrast is an expression of column names ("face - house"), weights (p,), or several weights (k, p)
tested together by F. Runs are combined as fixed effects, as nilearn's FirstLevelModel does.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from nilearn.glm import Contrast, expression_to_contrast_vector
from numpy.typing import ArrayLike, NDArray
from scipy import linalg

from raypipe.errors import InputError, RaypipeWarning
from raypipe.fmri.glm.designs import DesignMatrix
from raypipe.fmri.glm.projection import Projection
from raypipe.fmri.sources import Voxels

Floats = NDArray[np.float64]
Asked = str | ArrayLike


@dataclass(frozen=True, eq=False, kw_only=True)
class StatMap:
    """A contrast at each voxel, NaN for voxels that are not finite, 0 for constant ones.

    effect : (n_voxels,) for t, (k, n_voxels) whitened for F; variance : (n_voxels,); dof : of the noise
    """

    name: str
    kind: str
    effect: Floats
    variance: Floats
    dof: float

    def stat(self) -> Floats:
        """(n_voxels,) t or F values."""
        return np.asarray(self._contrast().stat(), np.float64)

    def p_value(self) -> Floats:
        """(n_voxels,) one-sided p values of effects above 0, or of F."""
        return np.asarray(self._contrast().p_value(), np.float64)

    def z_score(self) -> Floats:
        """(n_voxels,) normal scores of the p values."""
        return np.asarray(self._contrast().z_score(), np.float64)

    def _contrast(self) -> Contrast:
        return Contrast(self.effect, self.variance, dof=self.dof, stat_type=self.kind)


@dataclass(frozen=True, eq=False, kw_only=True)
class GlmResult:
    """voxels : (n_voxels,) flat indices; maps : contrast -> its map; constant, not_finite : (n_voxels,)."""

    voxels: Voxels
    maps: Mapping[str, StatMap]
    constant: NDArray[np.bool_]
    not_finite: NDArray[np.bool_]
    n_runs: int

    def summary(self) -> str:
        """One line for people."""
        return (
            f"{len(self.voxels)} voxels, {self.n_runs} run(s), {len(self.maps)} contrast(s); "
            f"{int(self.not_finite.sum())} voxels hold NaN or infinity, {int(self.constant.sum())} "
            "are constant"
        )


@dataclass(frozen=True, eq=False)
class Weighed:
    """A contrast of one run's design: weights (p,), or (k, p) for F, in coordinates (r,) or (k, r)."""

    name: str
    kind: str
    coordinates: Floats

    def answer(self, theta: Floats, dispersion: Floats, inverse: Floats) -> tuple[Floats, Floats]:
        """Effect (n,) or (k, n), and variance (n,), of voxels of one noise.

        theta : (n, r); dispersion : (n,); inverse : (r, r) of the design's noise gram
        """
        d = self.coordinates
        spread = d @ inverse @ d.T
        if self.kind == "t":
            return theta @ d, dispersion * spread
        values, vectors = linalg.eigh(spread)
        whiten = (vectors / np.sqrt(values)) @ vectors.T
        return whiten @ (d @ theta.T), dispersion


def weigh(
    name: str, asked: Asked, run: int, design: DesignMatrix, projection: Projection
) -> Weighed | None:
    """``asked`` of one run; None, with a warning, where it is 0 throughout.

    Raises InputError for unknown columns, a wrong length, or a contrast that the design cannot tell.
    """
    weights = _weights(name, asked, design)
    if not weights.any():
        warnings.warn(
            f"contrast {name} is 0 in run {run}; the run is left out of it",
            RaypipeWarning,
            stacklevel=3,
        )
        return None
    if not projection.estimable(weights):
        raise InputError(
            f"contrast {name} cannot be told from run {run}: its regressors are sums of others, or 0 "
            "(an event outside the run); leave one out, or model fewer conditions"
        )
    kind = "t" if weights.ndim == 1 else "F"
    return Weighed(name, kind, weights @ projection.back)


def _weights(name: str, asked: Asked, design: DesignMatrix) -> Floats:
    """(p,), or (k, p) for k > 1."""
    if isinstance(asked, str):
        try:
            weights = expression_to_contrast_vector(asked, list(design.names))
        except ValueError as error:
            raise InputError(
                f"contrast {name}, {asked!r}, is not made of the design's columns: "
                f"{', '.join(design.names)}"
            ) from error
    else:
        weights = np.asarray(asked, np.float64)
    weights = np.asarray(weights, np.float64)
    if weights.ndim == 2 and len(weights) == 1:
        weights = weights[0]
    if weights.ndim not in (1, 2) or weights.shape[-1] != len(design.names):
        raise InputError(
            f"contrast {name} has shape {weights.shape}, the design {len(design.names)} columns "
            f"({', '.join(design.names)}); give one weight a column"
        )
    if not np.isfinite(weights).all():
        raise InputError(f"contrast {name} holds a weight that is not finite; correct it")
    return weights


def of_run(asked: Asked | Sequence[Asked], run: int, n_runs: int, name: str) -> Asked:
    """One contrast may be given for all runs, or a list with one a run."""
    if not isinstance(asked, list):
        return asked  # type: ignore[return-value]
    if len(asked) != n_runs:
        raise InputError(
            f"contrast {name} is a list of {len(asked)} for {n_runs} runs; give one a run, weights as "
            "a tuple or array"
        )
    one: Asked = asked[run]
    return one
