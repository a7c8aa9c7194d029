"""Features and responses of one subject, side by side.

Everything that could put a response beside the wrong image is checked here: the number of rows, the
file names of the index against the image folder, and that responses are finite. Which rows train
and which choose the epoch is `raypipe.encoding.split`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import xxhash
from numpy.typing import NDArray

from raypipe.backbone.options import FeatureOptions
from raypipe.encoding.features import ComputedFeatures, Features, StoredFeatures
from raypipe.encoding.shapes import TokenShape
from raypipe.errors import InputError, MissingInput, UnknownName
from raypipe.read import AlgonautsSubject
from raypipe.store import open_or_placed
from raypipe.stream import ArraySource
from raypipe.stream.source import as_source

_CHECK_BYTES = 64 * 1024**2


class StoresIn(NamedTuple):
    """Stores below ``features_dir``, in folders called ``feature``."""

    features_dir: Path
    feature: str


@dataclass(frozen=True, eq=False, kw_only=True)
class SplitData:
    """One split of one subject, opened and checked.

    fmri : hemisphere -> .npy of (N, V), or None where responses are withheld
    """

    subject: AlgonautsSubject
    split: str
    features: Features
    shape: TokenShape
    fmri: Mapping[str, Path] | None

    @property
    def valid(self) -> NDArray[np.bool_]:
        """(N,) rows whose image could be read."""
        return self.features.valid

    @property
    def n_rows(self) -> int:
        """Images of the split, invalid ones included."""
        return len(self.valid)

    def responses(self) -> dict[str, ArraySource]:
        """The responses of both hemispheres as sources of rows. Raises MissingInput."""
        if self.fmri is None:
            raise MissingInput(
                f"subject {self.subject.subj} has no {self.split} fMRI at hand (the challenge"
                " withholds it); use --split val, or encode predict"
            )
        # A store's own (adopted, replicated, placed) is known by its manifest.
        found = {hemi: as_source(path) for hemi, path in self.fmri.items()}
        return {hemi: cast("ArraySource", source) for hemi, source in found.items()}


def open_split(
    data_dir: Path,
    place: StoresIn | FeatureOptions,
    subj: str,
    split: str,
    *,
    fmri: bool = True,
    kept_in: Path | None = None,
) -> SplitData:
    """Open and check ``split`` ("train" or "test") of a subject.

    ``place``: where its stores lie, or how to compute features from its images; of the latter
    ``kept_in`` is the run folder that may know them. Raises MissingInput, UnknownName,
    StoreNotSealed, StoreCorrupt, InputError (not the same images), and as `ComputedFeatures.open`.
    """
    subject = AlgonautsSubject.open(data_dir.resolve(), subj)
    features: Features
    if isinstance(place, FeatureOptions):
        paths = subject.image_paths(split)
        features = ComputedFeatures.open(paths, place, kept_in)
    else:
        path = _shard(place.features_dir.resolve(), place.feature, subject, split)
        features = StoredFeatures(open_or_placed(path))
        _check_names(features, subject, split)
    responses = subject.fmri(split) if fmri else None
    for hemi, file in (responses or {}).items():
        rows = np.load(file, mmap_mode="r").shape[0]
        if rows != len(features.names):
            raise InputError(
                f"{file} holds {rows} images, {features.path} {len(features.names)}; {hemi} responses"
                " and features must be of the same images: extract this subject again"
            )
    shape = TokenShape.of(features.row_shape, features.token_layout)
    return SplitData(subject=subject, split=split, features=features, shape=shape, fmri=responses)


def _shard(features_dir: Path, feature: str, subject: AlgonautsSubject, split: str) -> Path:
    if not features_dir.is_dir():
        raise MissingInput(f"features folder {features_dir} does not exist; run raypipe extract")
    folder = features_dir / feature
    if not folder.is_dir():
        kinds = ("manifest", "places")  # of stores, of catalogs that stand for some
        shards = [path for kind in kinds for path in features_dir.glob(f"*/*/*.{kind}.json")]
        known = {path.parent.parent.name for path in shards}
        raise UnknownName.of("feature", feature, known, f"folders below {features_dir}")
    return folder / subject.subj / f"{subject.shard_name(split)}.npy"


def _check_names(features: Features, subject: AlgonautsSubject, split: str) -> None:
    """Row i of the store must be image i of the folder, as row i of the responses is."""
    try:
        images = [path.name for path in subject.image_paths(split)]
    except MissingInput:
        return  # responses can be had without the images; the number of rows is still checked
    names = list(features.names)
    if names == images:
        return
    at = next((i for i, (a, b) in enumerate(zip(names, images, strict=False)) if a != b), None)
    where = (
        f"row {at} is {names[at]} in the store and {images[at]} in the folder"
        if at is not None
        else f"{len(names)} rows in the store, {len(images)} images in the folder"
    )
    raise InputError(
        f"features of subject {subject.subj} {split} are not of these images: {where}; extract again"
    )


def checked_digest(path: Path) -> str:
    """xxh3_128 of a (N, V) array: its dtype, shape and values, read once, a piece at a time.

    Raises InputError at the first NaN or infinity.
    """
    array = np.load(path, mmap_mode="r")
    digest = xxhash.xxh3_128(f"{array.dtype.str} {array.shape}".encode())
    step = max(1, _CHECK_BYTES // max(1, array[:1].nbytes))
    for lo in range(0, len(array), step):
        piece = np.ascontiguousarray(array[lo : lo + step])  # the map itself where it is C order
        digest.update(piece.data)
        good = np.isfinite(piece)
        if not good.all():
            row, vertex = np.argwhere(~good)[0]
            raise InputError(
                f"{path} is not finite at image {lo + row}, vertex {vertex}; training on it would"
                " spoil every weight: drop the vertex or the image first"
            )
    return digest.hexdigest()
