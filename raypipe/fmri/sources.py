"""Where voxels' time series come from, whatever holds them: an array, a file, the cache, several runs.

A source answers ``read(voxels)`` with (n, T) float32, so a model or a searchlight takes blocks of
voxels and never holds the scan. All but `ArraySeries` of an array in memory are small when pickled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raypipe.errors import InputError
from raypipe.fmri.clean import CleanConfig, clean
from raypipe.store.voxels import VoxelStore

Voxels = NDArray[np.int64]
Series = NDArray[np.float32]


class SeriesSource(Protocol):
    """voxels : (n_voxels,) int64, the flat indices that can be read, ascending."""

    @property
    def voxels(self) -> Voxels: ...

    @property
    def n_volumes(self) -> int: ...

    def read(self, voxels: Voxels) -> Series:
        """(n, n_volumes) float32 series of the flat indices ``voxels``, in that order."""
        ...


class ArraySeries:
    """An array or memory map (n_voxels, T); its rows are ``voxels``, or 0, 1, 2, ..."""

    def __init__(self, values: NDArray[np.generic], voxels: ArrayLike | None = None) -> None:
        if values.ndim != 2 or values.dtype.kind not in "iuf" or 0 in values.shape:
            raise InputError(
                f"series of shape {values.shape} and type {values.dtype}; give real numbers "
                "(voxels, volumes), at least one of each"
            )
        self._values = values
        rows = np.arange(len(values)) if voxels is None else np.asarray(voxels)
        self.voxels: Voxels = rows.astype(np.int64)
        if len(self.voxels) != len(values) or (np.diff(self.voxels) <= 0).any():
            raise InputError(
                f"{len(self.voxels)} voxels for {len(values)} series; give one flat index a series, "
                "ascending"
            )

    @property
    def n_volumes(self) -> int:
        return int(self._values.shape[1])

    def read(self, voxels: Voxels) -> Series:
        """See `SeriesSource`."""
        return np.asarray(self._values[_rows(self.voxels, voxels)], np.float32)


@dataclass(frozen=True, eq=False, kw_only=True)
class FileSeries:
    """A .npy file (n_voxels, T), mapped for each read; a handle of a few bytes. voxels as in the array."""

    path: Path
    voxels: Voxels

    @property
    def n_volumes(self) -> int:
        """Columns of the file."""
        return int(np.load(self.path, mmap_mode="r").shape[1])

    def read(self, voxels: Voxels) -> Series:
        """See `SeriesSource`."""
        return ArraySeries(np.load(self.path, mmap_mode="r"), self.voxels).read(voxels)


@dataclass(frozen=True, eq=False, kw_only=True)
class StoredSeries:
    """Voxels of a cache entry, scaled by its slope and intercept. voxels : all of the entry if None."""

    store: VoxelStore
    chosen: Voxels | None = None

    @property
    def voxels(self) -> Voxels:
        """The voxels chosen."""
        return np.asarray(self.store.voxels if self.chosen is None else self.chosen, np.int64)

    @property
    def n_volumes(self) -> int:
        """Volumes of the scan."""
        return self.store.n_volumes

    def read(self, voxels: Voxels) -> Series:
        """See `SeriesSource`."""
        return self.store.scaled(voxels)


@dataclass(frozen=True, eq=False, kw_only=True)
class JoinedSeries:
    """Runs of one grid put end to end; the voxels that all of them have."""

    parts: tuple[SeriesSource, ...]
    voxels: Voxels = field(init=False)

    def __post_init__(self) -> None:
        if not self.parts:
            raise InputError("no run to join; give one source of series or more")
        common = self.parts[0].voxels
        for part in self.parts[1:]:
            common = np.intersect1d(common, part.voxels, assume_unique=True)
        if common.size == 0:
            raise InputError("the runs have no voxel in common; they are on different grids")
        object.__setattr__(self, "voxels", common)

    @property
    def n_volumes(self) -> int:
        """Volumes of all runs."""
        return sum(part.n_volumes for part in self.parts)

    def read(self, voxels: Voxels) -> Series:
        """See `SeriesSource`."""
        return np.concatenate([part.read(voxels) for part in self.parts], axis=1)


@dataclass(frozen=True, eq=False, kw_only=True)
class CleanedSeries:
    """A source whose series are cleaned as they are read, run by run; no volume is scrubbed here.

    confounds : (T, k) or None; runs : (T,) or None for one run
    """

    source: SeriesSource
    config: CleanConfig
    confounds: NDArray[np.float64] | None = None
    runs: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.runs is not None and (np.diff(self.runs) < 0).any():
            raise InputError("run numbers fall from one volume to the next; number runs in order")

    @property
    def voxels(self) -> Voxels:
        """The source's."""
        return self.source.voxels

    @property
    def n_volumes(self) -> int:
        """The source's."""
        return self.source.n_volumes

    def read(self, voxels: Voxels) -> Series:
        """See `SeriesSource`."""
        series = self.source.read(voxels)
        return clean(series, self.config, confounds=self.confounds, runs=self.runs).values


def as_source(series: SeriesSource | NDArray[np.generic]) -> SeriesSource:
    """An array becomes a source whose voxels are its row numbers."""
    return ArraySeries(series) if isinstance(series, np.ndarray) else series


def _rows(known: Voxels, wanted: Voxels) -> Voxels:
    """Where each wanted voxel stands; raises InputError for one that is not known."""
    rows = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    missing = known[rows] != wanted
    if missing.any():
        raise InputError(
            f"voxel {np.asarray(wanted)[missing][0]} is not among the {len(known)} voxels of this "
            "series; choose of those"
        )
    return rows.astype(np.int64)
