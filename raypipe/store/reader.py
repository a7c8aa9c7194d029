"""Finished shards, opened read-only: `FeatureStore`, and `StoreLocator` to send one elsewhere.

A store travels as its locator and is opened again where it lands: never its bytes. Sizes are
checked before mapping: a file that was cut short is StoreCorrupt, not SIGBUS in the middle of a
run. What a row means is the index's and the manifest's business.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raypipe.errors import MissingInput, StoreCorrupt, StoreNotSealed
from raypipe.memory.guard import on_relief
from raypipe.store.commits import Commits
from raypipe.store.index import read_index
from raypipe.store.layout import FILE_DTYPES, ShardPaths, array_bytes, read_npy_header
from raypipe.store.manifest import DISCARDED, SEALED, Manifest

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class StoreLocator:
    """Where a sealed shard is and what it must turn out to be; small and picklable.

    dtype: logical (``bfloat16`` is uint16 in the file). node: whose disk, "" for a shared one.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    node: str
    fingerprint: str


class FeatureStore:
    """One sealed shard: ``store[rows]`` gives (n, *row_shape) from the map; pickles as a locator."""

    def __init__(self, path: Path, manifest: Manifest, array: np.memmap) -> None:
        """Not called directly: see `open`."""
        self.path = path
        self.array = array
        self._manifest = manifest
        on_relief(self)

    @classmethod
    def open(cls, path: Path | str, split: str | None = None) -> FeatureStore:
        """Open ``path``, a shard's .npy, or the shard ``split`` in the folder ``path``.

        Raises MissingInput, StoreNotSealed (with the progress), StoreCorrupt.
        """
        path = Path(path) if split is None else Path(path) / f"{split}.npy"
        paths = ShardPaths.of(path)
        manifest = Manifest.read(paths.manifest)
        if manifest is None or manifest.state == DISCARDED:
            raise MissingInput(_missing_text(paths, manifest))
        if manifest.state != SEALED:
            raise StoreNotSealed(
                f"{path} is not finished: {committed_rows(manifest)} of {manifest.shape[0]} rows; "
                "run the extract command that writes it again, it goes on where it stopped"
            )
        return cls(path, manifest, _map(path, manifest))

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest's fields."""
        return dict(self._manifest.fields)

    @property
    def logical_dtype(self) -> str:
        """float32, float16, or bfloat16: then `array` holds its bits as uint16."""
        return self._manifest.dtype

    @property
    def fingerprint(self) -> str:
        """sha256 of what decides the bytes."""
        return self._manifest.fingerprint

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, *row_shape)."""
        return self._manifest.shape

    @cached_property
    def index(self) -> pa.Table:
        """The index table: row, name, digest, size_bytes, valid, reason."""
        table = read_index(ShardPaths.of(self.path).index)
        if table.num_rows != len(self):
            raise StoreCorrupt(
                f"index of {self.path} has {table.num_rows} rows, the shard {len(self)}; extract "
                "again"
            )
        return table

    @cached_property
    def valid(self) -> np.ndarray:
        """(rows,) bool: False for a row whose image could not be used; it holds NaN."""
        return self.index.column("valid").to_numpy()

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Source file name of each row."""
        return tuple(self.index.column("name").to_pylist())

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Rows as NumPy indexing gives them: a slice is a view of the map, a list a copy."""
        return np.asarray(self.array[rows])

    def give_back(self) -> None:
        """Let go of the pages of the map that this process has touched, views of it included: they
        are read again when needed.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            self.array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    def locator(self, node_id: str = "") -> StoreLocator:
        """A handle to send instead of the data."""
        return StoreLocator(
            path=self.path.absolute(),
            dtype=self.logical_dtype,
            shape=self.shape,
            offset=self._manifest.cells.data_offset,
            node=node_id,
            fingerprint=self.fingerprint,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return open_locator, (self.locator(),)


def open_locator(locator: StoreLocator) -> FeatureStore:
    """Open the shard that ``locator`` means, here.

    Raises MissingInput when it is not on this node, StoreCorrupt when another store is there now.
    """
    store = FeatureStore.open(locator.path)
    if store.fingerprint != locator.fingerprint:
        raise StoreCorrupt(
            f"{locator.path} was replaced since it was located: fingerprint "
            f"{store.fingerprint[:12]}, expected {locator.fingerprint[:12]}; start the run again"
        )
    return store


def committed_rows(manifest: Manifest) -> int:
    """Rows that the journals of an unfinished shard hold as committed (not checked)."""
    paths = ShardPaths.of(manifest.path.with_name(str(manifest.fields["file"])))
    return Commits.read(manifest.cells, paths.journals(), manifest.fingerprint).rows_done


def check_file(path: Path, manifest: Manifest) -> None:
    """Raise StoreCorrupt unless header and size of ``path`` are those of its manifest."""
    try:
        with path.open("rb") as file:
            dtype, shape, offset = read_npy_header(file, str(path))
            size_bytes = file.seek(0, 2)
    except FileNotFoundError:
        raise StoreCorrupt(
            f"{path} is gone, its manifest is there; restore it, or extract with --overwrite"
        ) from None
    if (dtype, shape) != (FILE_DTYPES[manifest.dtype], manifest.shape):
        raise StoreCorrupt(
            f"{path} holds {dtype} {shape}, its manifest says {manifest.dtype} {manifest.shape}; "
            "they are of two stores: extract with --overwrite"
        )
    expected = offset + array_bytes(dtype, shape)
    if size_bytes != expected:
        raise StoreCorrupt(
            f"{path} has {size_bytes} bytes, {expected} are due; it was cut or overwritten: "
            "restore it, or extract with --overwrite"
        )


def _map(path: Path, manifest: Manifest) -> np.memmap:
    check_file(path, manifest)
    array = np.load(path, mmap_mode="r")
    assert isinstance(array, np.memmap)
    return array


def _missing_text(paths: ShardPaths, manifest: Manifest | None) -> str:
    if manifest is not None:
        return f"{paths.final} is being replaced; run the extract command that does so again"
    from raypipe.store.catalog import read_catalog  # which opens stores itself

    catalog = read_catalog(paths.final)
    if catalog is not None and not catalog.shared:
        listed = ", ".join(f"{place.path} on node {place.node}" for place in catalog.places)
        return (
            f"{paths.final} stands for a store on nodes' disks: {listed or 'none any more'}; give that "
            "path there, or copy it to this node with raypipe store replicate"
        )
    if paths.final.exists():
        return f"{paths.final} has no manifest {paths.manifest.name}; raypipe store adopt makes one"
    return f"no store at {paths.final}; check the folder, or run raypipe extract to make it"
