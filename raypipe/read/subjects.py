"""Whose folder: subject numbers and where each subject of an Algonauts data set lies."""

from __future__ import annotations

import re
from pathlib import Path

from raypipe.errors import ConfigError, InputError, MissingInput

_FOLDER_NAME = re.compile(r"subj\d{1,2}")


def normalise_subject(subj: str | int) -> str:
    """ "1", "01", "subj01" or 1 as "01"; raises ConfigError for anything else."""
    match = re.fullmatch(r"(?:subj)?([0-9]{1,2})", str(subj).strip())
    if match is None:
        raise ConfigError(f"subject {subj!r} is not a number such as 01, 1 or subj01; give one")
    return f"{int(match.group(1)):02d}"


def available_subjects(data_dir: Path) -> tuple[str, ...]:
    """The subjects in ``data_dir``, "01" first; one if it is a subject's own folder.

    Raises MissingInput when the folder does not exist, InputError as ``subject_folders`` does.
    """
    return tuple(subject_folders(data_dir))


def subject_folders(data_dir: Path) -> dict[str, Path]:
    """``{"01": path, …}`` in order; ``data_dir`` itself if it is one subject's own folder.

    Raises MissingInput when the folder does not exist, InputError when whose a folder is cannot be
    told: its name is not subjNN, or subj1 and subj01 are both there.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise MissingInput(
            f"data folder {data_dir} does not exist; give the folder that holds subj01, subj02, …, or "
            "one that directly holds the images"
        )
    if is_subject_folder(data_dir):
        return {_number_of(data_dir): data_dir}
    found: dict[str, Path] = {}
    for path in sorted(data_dir.glob("subj*")):
        if _FOLDER_NAME.fullmatch(path.name) and is_subject_folder(path):
            number = normalise_subject(path.name)
            if number in found:
                raise InputError(
                    f"{found[number]} and {path} are the same subject {number}; remove one of them"
                )
            found[number] = path
    return dict(sorted(found.items()))


def is_subject_folder(path: Path) -> bool:
    """Whether ``path`` holds a split of the Algonauts layout."""
    return (path / "training_split").is_dir() or (path / "test_split").is_dir()


def _number_of(path: Path) -> str:
    """The number in a subject folder's name."""
    name = path.resolve().name if path.name in ("", ".", "..") else path.name
    if _FOLDER_NAME.fullmatch(name) is None:
        raise InputError(
            f"folder {path} is one subject's own but is not named subjNN, so whose it is cannot be "
            "told; rename it, or give the folder above it"
        )
    return normalise_subject(name)
