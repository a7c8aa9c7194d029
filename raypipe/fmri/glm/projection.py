"""A design's column space, and least squares in it under white or AR(1) noise.

All is done in an orthonormal basis Q of the design X: there the equations stay well conditioned
whatever the scales of confounds. An AR(1) coefficient rho whitens by W = I - rho L (L delays by one
volume), so the noise enters through V = W'W = I - rho (L + L') + rho^2 L'L, which is tridiagonal:
products of series with Q and (L + L')Q, made once a block, serve every rho.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from raypipe.errors import InputError

Floats = NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
_ESTIMABLE = 1e-6  # of a contrast's length that may lie outside what the design tells
_CONSTANT = 1e-8  # of a constant's length that may lie outside the design


@dataclass(frozen=True, eq=False, kw_only=True)
class Projection:
    """q : (T, r) orthonormal; back : (p, r) coordinates -> betas; rows : (p, r) what can be estimated.

    lagged : (T, r), (L + L') q; n_columns : p; dof : T less the design's rank
    """

    q: Floats
    back: Floats
    rows: Floats
    lagged: Floats
    n_columns: int
    dof: int

    @classmethod
    def of(cls, design: Floats) -> Projection:
        """design : (T, p). Raises InputError when no degree of freedom is left."""
        n_volumes, p = design.shape
        if p >= n_volumes:
            raise InputError(
                f"{p} regressors for {n_volumes} volumes leave no noise to judge by; use fewer "
                "confounds or drift terms, or, for trials, least squares separate (lss)"
            )
        u, s, vt = linalg.svd(design, full_matrices=False)
        keep = s > s[0] * max(design.shape) * _EPS  # scipy.linalg.pinv's
        rank = int((s > np.abs(design).sum() * _EPS).sum())  # nilearn's, for degrees of freedom
        q = np.ascontiguousarray(u[:, keep])
        rows = np.ascontiguousarray(vt[keep].T)
        return cls(
            q=q,
            back=rows / s[keep],
            rows=rows,
            lagged=neighbours(q),
            n_columns=p,
            dof=n_volumes - rank,
        )

    @property
    def has_constant(self) -> bool:
        """Whether residuals have mean 0: the constant lies in the design."""
        ones = np.ones(len(self.q))
        left = ones - self.q @ (self.q.T @ ones)
        return bool(np.linalg.norm(left) < _CONSTANT * np.sqrt(len(ones)))

    def estimable(self, contrast: Floats) -> bool:
        """Whether ``contrast`` (p,) or (k, p) has one answer, however collinear the design is."""
        outside = contrast - (contrast @ self.rows) @ self.rows.T
        return bool(np.linalg.norm(outside) <= _ESTIMABLE * np.linalg.norm(contrast))

    def split(self, series: Floats) -> tuple[Floats, Floats]:
        """series : (n, T) -> ordinary coordinates (n, r) and residuals (n, T)."""
        theta = series @ self.q
        return theta, series - theta @ self.q.T

    def noise_gram(self, rho: float) -> Floats:
        """(r, r), Q'VQ."""
        last = self.q[-1]
        gram = (1 + rho**2) * np.eye(len(last)) - rho * (self.q.T @ self.lagged)
        return gram - rho**2 * np.outer(last, last)


def neighbours(columns: Floats) -> Floats:
    """(L + L') columns: each row becomes the sum of the rows before and after it. columns : (T, k)."""
    out = np.zeros_like(columns)
    out[1:] += columns[:-1]
    out[:-1] += columns[1:]
    return out
