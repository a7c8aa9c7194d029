"""A part of the rows held out, the rest left, by a seed and with no list of either.

``range(n)`` is cut into as many stretches of neighbours as rows are held out, equal but for one row;
from each a keyed draw of (seed, stretch) takes one. So both parts are computed from a place, in
ascending order: the largest row is the last, places that are near lie near in the file (which is
what `raypipe.stream.window` and the reading of validation rows live on), and a row is held out
whatever the other stretches draw. The first rows of a keyed permutation would be held out as evenly,
and give none of this. The epoch's order is `raypipe.stream.plan`'s, over the places of what is left.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from raypipe.errors import ConfigError
from raypipe.stream.permutation import keyed_draws
from raypipe.stream.rows import ComputedRows

# Raised whenever other rows would come of the same numbers: a checkpoint then fits no more.
_VERSION = 1
_MAX_PRODUCT = 2**63


def split_rows(n: int, n_held: int, seed: int) -> tuple[SplitRows, SplitRows]:
    """(left, held): ``range(n)`` in two, ``n_held`` rows held out; a few numbers each.

    Raises ConfigError unless both have a row.
    """
    n, n_held, seed = int(n), int(n_held), int(seed)  # numpy's would run over
    if not 0 < n_held < n:
        raise ConfigError(f"{n_held} of {n} rows held out: both parts need at least one")
    # The smaller part is drawn: stretches of two rows and more, so that each draw is one.
    drawn = 2 * n_held <= n
    return (
        SplitRows(size=n - n_held, n=n, seed=seed, drawn=not drawn),
        SplitRows(size=n_held, n=n, seed=seed, drawn=drawn),
    )


@dataclass(frozen=True, kw_only=True)
class SplitRows(ComputedRows):
    """``size`` rows of ``range(n)``: one drawn from each stretch (``drawn``), or all the others.

    Raises ConfigError when the drawn rows are more than the others, n times the drawn rows is 2**63
    or above, or the seed is negative.
    """

    n: int
    seed: int
    drawn: bool

    def __post_init__(self) -> None:
        if not 1 <= self.stretches <= self.n // 2:
            raise ConfigError(
                f"{self.stretches} rows drawn of {self.n}: give 1 to half of them; the others are the rest"
            )
        if self.n * self.stretches >= _MAX_PRODUCT:
            raise ConfigError(
                f"{self.stretches} rows drawn of {self.n}: their product is 2**63 or above; hold out fewer"
            )
        if self.seed < 0:
            raise ConfigError(f"split seed {self.seed}: give a non-negative whole number")

    @property
    def stretches(self) -> int:
        """Stretches that ``range(n)`` is cut into."""
        return self.size if self.drawn else self.n - self.size

    def digest(self) -> str:
        """Of the numbers that the rows follow from: nothing of size n is computed."""
        said = f"raypipe split {_VERSION}: {self.size} of {self.n}, {self.seed}, {self.drawn}"
        return hashlib.sha256(said.encode()).hexdigest()

    def at(self, places: np.ndarray) -> np.ndarray:
        if self.drawn:
            return self._drawn(places)
        # The last stretch before which no more than ``places`` rows are left: j (n - v) / v < p + 1.
        stretch = ((places + 1) * self.stretches - 1) // self.size
        rows = places + stretch
        return rows + (rows >= self._drawn(stretch))

    def _drawn(self, stretch: np.ndarray) -> np.ndarray:
        """The row that each stretch gives."""
        first = stretch * self.n // self.stretches
        sizes = (stretch + 1) * self.n // self.stretches - first
        return first + keyed_draws(stretch, sizes, (self.seed, _VERSION))
