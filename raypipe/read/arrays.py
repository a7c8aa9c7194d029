"""The .npy files beside the images: opened read-only, without pickles, their headers checked.

Says what is wrong with a file in one line. Which files belong together is ``algonauts.py``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from raypipe.errors import InputError, MissingInput


def require_file(path: Path, what: str, remedy: str) -> Path:
    """``path`` if it is a file; else MissingInput ``WHAT PATH does not exist; REMEDY``."""
    if not path.is_file():
        raise MissingInput(f"{what} {path} does not exist; {remedy}")
    return path


def open_array(path: Path) -> np.ndarray:
    """The array in ``path``, mapped read-only; raises InputError for what is not one."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} is not a readable .npy array: {reason}; copy the file again"
        ) from error
    if not isinstance(array, np.ndarray):
        array.close()  # an .npz, whatever its name says
        raise InputError(f"{path} is an .npz archive, not a .npy array; save the array by itself")
    return array


def fmri_shape(path: Path) -> tuple[int, int]:
    """(n_images, n_vertices) of a response file; raises InputError unless it holds 2-D floats."""
    array = open_array(path)
    if array.ndim != 2 or array.dtype.kind != "f":
        raise InputError(
            f"fMRI {path} has shape {array.shape} and dtype {array.dtype}; "
            "it must be (images, vertices) of floats: save it so"
        )
    return int(array.shape[0]), int(array.shape[1])


def roi_labels(path: Path, n_vertices: int, mapping: dict[int, str]) -> np.ndarray:
    """Labels (n_vertices,) of one ROI family; raises InputError for another size or unknown label."""
    labels = open_array(path)
    if labels.shape != (n_vertices,):
        raise InputError(
            f"ROI mask {path} has shape {labels.shape}, the fMRI {n_vertices} vertices; "
            "they are of different subjects or spaces: copy the subject's own files"
        )
    known = np.isin(labels, [*mapping, 0])
    if not known.all():
        raise InputError(
            f"ROI mask {path} holds label {labels[~known][0]}, which its mapping does not name; "
            "copy mask and mapping from the same place"
        )
    return labels


def check_ceiling(path: Path, n_vertices: int) -> None:
    """Raises InputError unless ``path`` holds (n_vertices,) floats, each in 0..1 or NaN."""
    ceiling = open_array(path)
    if ceiling.shape != (n_vertices,) or ceiling.dtype.kind != "f":
        raise InputError(
            f"noise ceiling {path} has shape {ceiling.shape} and dtype {ceiling.dtype}; "
            f"it must be ({n_vertices},) of floats, as the fMRI: copy the subject's own file"
        )
    wrong = ceiling[~(np.isnan(ceiling) | ((ceiling >= 0) & (ceiling <= 1)))]
    if wrong.size:
        raise InputError(
            f"noise ceiling {path} holds {wrong[0]:g}; it must be a fraction of variance, 0..1: "
            "divide NSD's percent by 100"
        )
