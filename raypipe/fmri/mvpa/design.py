"""Which volumes make up which sample, what each sample shows, and in which run it was measured.

A sample is one volume, or the mean of a trial's volumes. Making a design of labels or of events is
``sampling.py``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import InputError, RaypipeWarning

Rows = NDArray[np.int64]


@dataclass(frozen=True, eq=False, kw_only=True)
class Design:
    """n samples of a time series.

    labels : (n,) str for classes, float64 for a regression target
    runs : (n,) the run of each; blocks : (n,) samples of one block were not assigned independently
    start, volumes : sample i is the mean of volumes[start[i]:start[i + 1]]
    """

    labels: NDArray[np.generic]
    runs: Rows
    blocks: Rows
    start: Rows
    volumes: Rows

    def __post_init__(self) -> None:
        n = len(self.labels)
        if n == 0:
            raise InputError("the design has no sample; check labels, delay and scrubbing")
        if len(self.runs) != n or len(self.blocks) != n or len(self.start) != n + 1:
            raise InputError(
                f"{n} labels, {len(self.runs)} runs, {len(self.blocks)} blocks and "
                f"{len(self.start)} starts do not fit; give one of each a sample, and n + 1 starts"
            )
        if (np.diff(self.start) < 1).any() or self.start[-1] != len(self.volumes):
            raise InputError("a sample of the design has no volume; leave it out")
        if not self.is_classes and not np.isfinite(self.labels.astype(np.float64)).all():
            raise InputError("a regression target is not finite; leave those samples out")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_classes(self) -> bool:
        """Whether labels are classes, not numbers to regress on."""
        return self.labels.dtype.kind in "US"

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes in sorted order; none for a regression target."""
        return tuple(str(c) for c in np.unique(self.labels)) if self.is_classes else ()

    def encoded(self) -> NDArray[np.generic]:
        """(n,) int64 places in ``classes``, or the target as float64."""
        if not self.is_classes:
            return self.labels.astype(np.float64)
        return np.unique(self.labels, return_inverse=True)[1].astype(np.int64)

    def samples(self, series: NDArray[np.float32]) -> NDArray[np.float64]:
        """series : (n_voxels, T) -> patterns (n, n_voxels) float64."""
        if self.volumes.size and self.volumes.max() >= series.shape[1]:
            raise InputError(
                f"the design names volume {self.volumes.max()}, the series has {series.shape[1]}; "
                "they are of different scans, or of a scrubbed one: see Design.left"
            )
        if len(self.volumes) == len(self):  # one volume a sample
            return np.ascontiguousarray(series[:, self.volumes].T, dtype=np.float64)
        count = np.diff(self.start)[:, np.newaxis]
        gathered = series[:, self.volumes].T.astype(np.float64)
        means: NDArray[np.float64] = np.add.reduceat(gathered, self.start[:-1], axis=0) / count
        return means

    def choose(self, samples: NDArray[np.bool_] | Rows) -> Design:
        """The design of these samples alone, e.g. ``design.choose(np.isin(design.labels, [...]))``."""
        rows = np.arange(len(self))[samples]
        parts = [self.volumes[self.start[i] : self.start[i + 1]] for i in rows]
        return Design(
            labels=self.labels[rows],
            runs=self.runs[rows],
            blocks=self.blocks[rows],
            start=np.concatenate(([0], np.cumsum([len(part) for part in parts]))).astype(np.int64),
            volumes=np.concatenate([np.empty(0, np.int64), *parts]),
        )

    def of_classes(self, classes: Sequence[str]) -> Design:
        """The samples of ``classes``; raises InputError for one that is not there."""
        missing = sorted(set(classes) - set(self.classes))
        if missing:
            raise InputError(
                f"class {missing[0]!r} has no sample; there are {', '.join(self.classes)}"
            )
        return self.choose(np.isin(self.labels, list(classes)))

    def left(self, volumes: Rows) -> Design:
        """The design on a scrubbed series whose columns are ``volumes`` (``Cleaned.volumes``).

        Samples without a volume left are dropped, and their number told in a RaypipeWarning.
        """
        column = np.full(max(int(volumes.max()), int(self.volumes.max())) + 1, -1, np.int64)
        column[volumes] = np.arange(len(volumes))
        at = column[self.volumes]
        kept = np.add.reduceat((at >= 0).astype(np.int64), self.start[:-1])
        start = np.concatenate(([0], np.cumsum(kept))).astype(np.int64)
        lost = int((kept == 0).sum())
        if lost:
            warnings.warn(
                f"{lost} of {len(self)} samples were scrubbed away and are left out",
                RaypipeWarning,
                stacklevel=2,
            )
        rows = kept > 0
        return Design(
            labels=self.labels[rows],
            runs=self.runs[rows],
            blocks=self.blocks[rows],
            start=np.concatenate((start[:-1][rows], start[-1:])),
            volumes=at[at >= 0],
        )
