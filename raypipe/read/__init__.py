"""Files -> arrays: image folders and the Algonauts 2023 / NSD layout.

Covers finding, ordering and reading the files of a data set, and saying in one line why one cannot
be read. Turning pixels into a model's input is ``raypipe.backbone``; what is kept of a run is
``raypipe.store``. Start at ``algonauts.py``; one picture's way is ``images.py``. Scans are ``nifti``;
images of any size and depth, read by crops, ``source2d`` and ``tiff``. No torch, no ray.
"""

from __future__ import annotations

from raypipe.read.algonauts import ALL_FAMILIES, HEMISPHERES, ROI_FAMILIES, AlgonautsSubject
from raypipe.read.folder import ImageFolder, ImageSource
from raypipe.read.images import (
    IMAGE_SUFFIXES,
    Decoded,
    Undecodable,
    first_size,
    list_images,
    read_image,
    try_read_image,
)
from raypipe.read.restricted_pickle import load_roi_mapping
from raypipe.read.subjects import available_subjects, normalise_subject

__all__ = [
    "ALL_FAMILIES",
    "HEMISPHERES",
    "IMAGE_SUFFIXES",
    "ROI_FAMILIES",
    "AlgonautsSubject",
    "Decoded",
    "ImageFolder",
    "ImageSource",
    "Undecodable",
    "available_subjects",
    "first_size",
    "list_images",
    "load_roi_mapping",
    "normalise_subject",
    "read_image",
    "try_read_image",
]
