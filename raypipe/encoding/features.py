"""The features of one split, however they come: a sealed store, or images and a frozen backbone.

Both say the same of themselves, so that the rest of encoding need not ask which it is: names,
valid rows, shape, what made them. What differs is what a batch is gathered from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from raypipe import config as configs
from raypipe.backbone.options import ITEMSIZE, FeatureOptions, feature_identity
from raypipe.encoding.frozen import FrozenBackbone, frozen
from raypipe.errors import ConfigError
from raypipe.report.saved import write_bytes
from raypipe.store import FeatureStore, PlacedStore
from raypipe.stream import ArraySource
from raypipe.stream.pixels import PixelSource
from raypipe.stream.reading import Source
from raypipe.stream.scan import Scan, read_seen, scan

SCAN_FILE = "images.parquet"


class Features(Protocol):
    """What is asked of a split's features.

    names : (N,) image files; valid : (N,) bool; row_shape : (tokens, dim) of ``dtype``;
    identity, token_layout : as a store's manifest has them
    """

    @property
    def path(self) -> Path: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def valid(self) -> NDArray[np.bool_]: ...
    @property
    def row_shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def identity(self) -> Mapping[str, Any]: ...
    @property
    def token_layout(self) -> Mapping[str, Any]: ...
    @property
    def backbone(self) -> FrozenBackbone | None: ...

    def sources(self) -> dict[str, Source]:
        """What a batch is gathered from: "tokens", or "pixels" for the backbone."""
        ...

    def fingerprints(self) -> dict[str, str]:
        """What a resumed run must share, by the name that a person is told when it does not."""
        ...

    def keep(self, run_dir: Path) -> None:
        """Write beside the run what need not be found out again."""
        ...


@dataclass(frozen=True)
class StoredFeatures:
    """Features in a sealed store, here or on nodes' disks."""

    store: FeatureStore | PlacedStore
    backbone: FrozenBackbone | None = None

    @property
    def path(self) -> Path:
        return Path(self.store.path)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.store.names)

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        return np.asarray(self.store.valid, bool)

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.store.shape[1:]

    @property
    def dtype(self) -> str:
        return self.store.logical_dtype

    @property
    def fingerprint(self) -> str:
        return self.store.fingerprint

    @property
    def identity(self) -> Mapping[str, Any]:
        return self.store.manifest.get("identity") or {}

    @property
    def token_layout(self) -> Mapping[str, Any]:
        return self.store.manifest.get("token_layout") or {}

    def sources(self) -> dict[str, Source]:
        return {"tokens": ArraySource.of_locator(self.store.locator())}

    def fingerprints(self) -> dict[str, str]:
        return {"features": self.fingerprint}

    def keep(self, run_dir: Path) -> None:
        """Nothing: the store is the record."""


@dataclass(frozen=True)
class ComputedFeatures:
    """Features computed from images each time that they are needed."""

    scan: Scan
    options: FeatureOptions
    backbone: FrozenBackbone
    token_layout: Mapping[str, Any]

    @classmethod
    def open(
        cls, paths: Sequence[Path], options: FeatureOptions, kept_in: Path | None = None
    ) -> ComputedFeatures:
        """Features of ``paths`` as ``options`` say; every image is read, unless ``kept_in`` (a run
        folder) tells what it holds.

        Raises ConfigError (several layers, options out of range), BadImage, InputError,
        WeightsUnavailable, UnknownName.
        """
        from raypipe.backbone.model import layouts

        spec = options.spec()
        if len(spec.layers) != 1:
            raise ConfigError(
                f"{spec.name} gives {len(spec.layers)} layers; on the fly a run is of one: name it "
                "with --layer"
            )
        (layer,) = (one.key for one in spec.layers)
        known = read_seen(kept_in / SCAN_FILE) if kept_in else {}
        fail = options.on_bad_image == "fail"
        found = scan(paths, spec.preprocess, threads=options.decode_threads, known=known, fail=fail)
        layout = layouts(spec, found.image_hw)[layer]
        backbone = frozen(spec, layer, options, (layout.n_tokens, layout.dim))
        return cls(found, options, backbone, layout.describe())

    @property
    def path(self) -> Path:
        return self.scan.folder

    @property
    def names(self) -> tuple[str, ...]:
        return self.scan.names

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        return self.scan.valid

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.backbone.row_shape

    @property
    def dtype(self) -> str:
        return self.backbone.dtype

    @property
    def folder(self) -> str:
        """Where a store of these features would lie below its root: "dinov2_q_last"."""
        return self.backbone.spec.folder(self.backbone.layer)

    @property
    def store_bytes(self) -> int:
        """What these features would take on disk."""
        tokens, dim = self.row_shape
        return len(self.names) * tokens * dim * ITEMSIZE[self.dtype]

    @property
    def identity(self) -> Mapping[str, Any]:
        """As the manifest of a store of these features would have it."""
        bone = self.backbone
        sha256, hw = bone.weights_sha256, self.scan.image_hw
        return feature_identity(self.options, bone.spec, bone.layer, sha256, hw)

    @property
    def fingerprint(self) -> str:
        return _digest("".join(self.fingerprints().values()))

    def sources(self) -> dict[str, Source]:
        source: PixelSource = self.scan.source(
            self.backbone.spec.preprocess, self.options.decode_threads, self.fingerprint
        )
        return {"pixels": source}

    def fingerprints(self) -> dict[str, str]:
        made_by = configs.dumps({**self.identity, "dtype": self.dtype})
        return {"images": self.scan.fingerprint, "backbone": _digest(made_by)}

    def keep(self, run_dir: Path) -> None:
        """What the images hold: a resumed run reads those only that changed."""
        write_bytes(run_dir / SCAN_FILE, self.scan.dumps())


def _digest(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())
