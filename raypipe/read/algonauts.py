"""The Algonauts 2023 layout: one subject's images, fMRI responses, ROI masks and noise ceiling.

    subjNN/
      training_split/training_images/train-%04d_nsd-%05d.png
      training_split/training_fmri/{lh,rh}_training_fmri.npy     (n_images, n_vertices) float32
      test_split/test_images/test-%04d_nsd-%05d.png
      test_split/test_fmri/{lh,rh}_test_fmri.npy                 ours; the challenge withholds them
      roi_masks/mapping_FAMILY.npy, {lh,rh}.FAMILY_challenge_space.npy
      noise_ceiling/{lh,rh}_noise_ceiling.npy                    (n_vertices,) fraction 0..1

Paths are handed out, not arrays: who reads, maps. Finding subjects is ``subjects.py``, checking the
arrays ``arrays.py``; a plain folder of images is ``folder.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from raypipe.errors import InputError, MissingInput, UnknownName
from raypipe.read.arrays import check_ceiling, fmri_shape, require_file, roi_labels
from raypipe.read.images import list_images
from raypipe.read.restricted_pickle import load_roi_mapping
from raypipe.read.subjects import normalise_subject, subject_folders

HEMISPHERES = ("lh", "rh")
# The 24 ROIs of the challenge; "streams" is a coarser atlas over the same vertices, so apart.
ROI_FAMILIES = ("prf-visualrois", "floc-bodies", "floc-faces", "floc-places", "floc-words")
ALL_FAMILIES = (*ROI_FAMILIES, "streams")

_IMAGES = {"train": "training_split/training_images", "test": "test_split/test_images"}
_FMRI = {
    "train": "training_split/training_fmri/{}_training_fmri.npy",
    "test": "test_split/test_fmri/{}_test_fmri.npy",
}
_SHARDS = {"train": "train", "test": "synt"}  # the names in the stores that users have
_IMAGE_NAME = re.compile(r"(?:train|test)-(\d+)_nsd-\d+\.\w+")


@dataclass(frozen=True)
class AlgonautsSubject:
    """One subject's folder; ``subj`` is "01" and the like, and names its folder in a store."""

    root: Path
    subj: str

    @classmethod
    def open(cls, data_dir: Path, subj: str | int) -> AlgonautsSubject:
        """Subject ``subj`` of ``data_dir``, which holds subj01, … or is one subject's own folder.

        Raises MissingInput when there is no such folder or nothing in this layout in it,
        UnknownName when the subject is not there, ConfigError when ``subj`` is no subject number.
        """
        number = normalise_subject(subj)
        folders = subject_folders(data_dir)
        if not folders:
            raise MissingInput(
                f"data folder {data_dir} holds no subjNN/training_split and no subjNN/test_split; "
                "give the folder that holds subj01, subj02, …"
            )
        if number not in folders:
            hint = f"choose one of those in {data_dir}"
            known = [f"subj{name}" for name in folders]
            raise UnknownName.of("subject", f"subj{number}", known, hint)
        return cls(folders[number], number)

    @property
    def key(self) -> str:
        """The subject's folder in a store: "01"."""
        return self.subj

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits whose image folder is there."""
        return tuple(split for split, folder in _IMAGES.items() if (self.root / folder).is_dir())

    def image_paths(self, split: str = "train") -> tuple[Path, ...]:
        """The split's images, sorted by file name: row i of the fMRI belongs to image i.

        Raises MissingInput when there are none, InputError when the numbers in the names do not
        rise in that order (train-10000 sorts before train-9999): rows and responses would not match.
        """
        paths = list_images(self.root / _IMAGES[_checked(split)])
        for before, after in pairwise(paths):
            if _number(after) <= _number(before):
                raise InputError(
                    f"image {after.name} sorts after {before.name} but its number is not larger; "
                    "pad the numbers in the file names to one width"
                )
        return paths

    def shard_name(self, split: str = "train") -> str:
        """The split's file in a store, without suffix: "train", or "synt" for the test images."""
        return _SHARDS[_checked(split)]

    def fmri(self, split: str = "train") -> dict[str, Path]:
        """``{"lh": path, "rh": path}`` of (n_images, n_vertices) float .npy files, headers checked.

        Raises MissingInput when they are absent (the challenge withholds the test responses),
        InputError when they are not such arrays or the hemispheres differ in n_images.
        """
        what, remedy = {
            "train": ("fMRI", "copy the subject's training_fmri folder from the Algonauts data"),
            "test": (
                "test fMRI, which the Algonauts challenge withholds,",
                "score on the validation part of the training split instead",
            ),
        }[_checked(split)]
        paths = {hemi: self.root / _FMRI[split].format(hemi) for hemi in HEMISPHERES}
        rows = {
            hemi: fmri_shape(require_file(path, what, remedy))[0] for hemi, path in paths.items()
        }
        if rows["lh"] != rows["rh"]:
            raise InputError(
                f"{paths['lh'].parent}: lh holds {rows['lh']} images, rh {rows['rh']}; "
                "both must hold the same images: copy the files again"
            )
        return paths

    def n_vertices(self) -> dict[str, int]:
        """Vertices of each hemisphere, by the responses of the first split that has them."""
        for split in ("train", "test"):
            if (self.root / _FMRI[split]).parent.is_dir():
                return {hemi: fmri_shape(path)[1] for hemi, path in self.fmri(split).items()}
        raise MissingInput(f"{self.root} holds no fMRI; copy training_split/training_fmri there")

    def missing_families(self, families: Sequence[str] = ALL_FAMILIES) -> tuple[str, ...]:
        """Those of ``families`` of which ``roi_masks`` holds no file at all."""
        return tuple(
            family for family in families if not any(p.is_file() for p in self._files(family))
        )

    def rois(self, families: Sequence[str] = ROI_FAMILIES) -> dict[str, dict[str, np.ndarray]]:
        """``{"lh": {"V1v": mask, …}, "rh": …}``, each mask (n_vertices,) bool.

        A ROI that its mapping names but no vertex carries keeps an empty mask, so that all subjects
        have the same ROIs. A family without files is left out: ``missing_families`` names it.
        Raises MissingInput when a family's files are only partly there, InputError when a mask does
        not fit the fMRI or its mapping, or a name comes twice.
        """
        absent = self.missing_families(families)
        masks: dict[str, dict[str, np.ndarray]] = {hemi: {} for hemi in HEMISPHERES}
        for family in families:
            if family in absent:
                continue
            for hemi, of_family in self._family_masks(family).items():
                twice = sorted(masks[hemi].keys() & of_family.keys())
                if twice:
                    raise InputError(
                        f"ROI {twice[0]!r} of family {family} has another family's name; "
                        f"names must differ: mend mapping_{family}.npy"
                    )
                masks[hemi] |= of_family
        return masks

    def noise_ceiling(self) -> dict[str, Path] | None:
        """``{"lh": path, "rh": path}`` of (n_vertices,) explainable variance 0..1, or None.

        Raises MissingInput when only one hemisphere is there, InputError for values outside 0..1
        or another number of vertices than the fMRI.
        """
        folder = self.root / "noise_ceiling"
        paths = {hemi: folder / f"{hemi}_noise_ceiling.npy" for hemi in HEMISPHERES}
        if not any(path.is_file() for path in paths.values()):
            return None
        n_vertices = self.n_vertices()
        for hemi, path in paths.items():
            require_file(path, "noise ceiling", "give both hemispheres or neither")
            check_ceiling(path, n_vertices[hemi])
        return paths

    def _files(self, family: str) -> tuple[Path, Path, Path]:
        """Mapping, left and right mask of a family."""
        if family not in ALL_FAMILIES:
            raise UnknownName.of("ROI family", family, ALL_FAMILIES)
        folder = self.root / "roi_masks"
        lh, rh = (folder / f"{hemi}.{family}_challenge_space.npy" for hemi in HEMISPHERES)
        return folder / f"mapping_{family}.npy", lh, rh

    def _family_masks(self, family: str) -> dict[str, dict[str, np.ndarray]]:
        """One family's masks, by hemisphere and name; label 0 is "Unknown", in none of its ROIs."""
        mapping_path, *mask_paths = self._files(family)
        mapping = load_roi_mapping(mapping_path)
        named = {label: name for label, name in sorted(mapping.items()) if label != 0}
        if len(set(named.values())) < len(named):
            raise InputError(f"ROI mapping {mapping_path} gives one name to two labels; mend it")
        n_vertices = self.n_vertices()
        masks = {}
        for hemi, path in zip(HEMISPHERES, mask_paths, strict=True):
            require_file(path, "ROI mask", f"copy all files of family {family}, or none of them")
            labels = roi_labels(path, n_vertices[hemi], mapping)
            masks[hemi] = {name: np.asarray(labels == label) for label, name in named.items()}
        return masks


def _checked(split: str) -> str:
    if split not in _IMAGES:
        raise UnknownName.of("split", split, _IMAGES, "an Algonauts subject has train and test")
    return split


def _number(path: Path) -> float:
    """The number in an image's name; NaN, out of order with nothing, if it has none."""
    match = _IMAGE_NAME.fullmatch(path.name)
    return int(match.group(1)) if match else float("nan")
