"""Files of one OME-TIFF set: planes of one stack, each in a file of its own.

The first page's OME-XML names the files of its set, by name and UUID, or the one that has the metadata
(BinaryOnly). Files that name each other, or the same, are a set. Stacks in numbered files (z001.tif)
say nothing of each other, and look like pictures in numbered files: they are not told apart here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

_TIFF = (".tif", ".tiff")
_UUID = re.compile(r"<(?:\w+:)?UUID\b([^>]*)>\s*([^<\s]+)")
_FILE_NAME = re.compile(r"\bFileName\s*=\s*[\"']([^\"']+)")
_BINARY_ONLY = re.compile(r"<(?:\w+:)?BinaryOnly\b([^>]*)>")
_META = re.compile(r"\bMetadataFile\s*=\s*[\"']([^\"']+)")
_OWN = re.compile(r"<(?:\w+:)?(?:OME|BinaryOnly)\b[^>]*?\bUUID\s*=\s*[\"']([^\"']+)")


def sets_of(paths: Iterable[Path]) -> dict[Path, Path]:
    """The first file of its set, for each of ``paths`` (resolved) that shares one with another."""
    owner: dict[str, str] = {}

    def root(name: str) -> str:
        while owner.setdefault(name, name) != name:
            name = owner[name]
        return name

    members = [path for path in dict.fromkeys(paths) if path.suffix.lower() in _TIFF]
    for path in members:
        for name in named_in(_description(path), path.parent):
            owner[root(name)] = root(str(path))
    sets: dict[str, list[Path]] = {}
    for path in members:
        sets.setdefault(root(str(path)), []).append(path)
    return {path: min(one) for one in sets.values() if len(one) > 1 for path in one}


def named_in(xml: str, folder: Path) -> set[str]:
    """Paths and UUIDs of the set that an OME-XML names; none where it is of one file."""
    listed = _UUID.findall(xml)
    alone = len({(_FILE_NAME.findall(more)[-1:] or [""])[0] or uuid for more, uuid in listed}) < 2
    if alone and not _BINARY_ONLY.search(xml):
        return set()
    files = [name for more, _ in listed for name in _FILE_NAME.findall(more)]
    files += [name for more in _BINARY_ONLY.findall(xml) for name in _META.findall(more)]
    uuids = {uuid for _, uuid in listed} | set(_OWN.findall(xml))
    return uuids | {str((folder / name).resolve()) for name in files}


def _description(path: Path) -> str:
    """The OME-XML of the file, "" where it has none."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        return str(file.pages[0].description or "") if file.is_ome else ""


def source_of(path: Path, sets: Mapping[Path, Path]) -> Path:
    """The file itself, or the first of its set."""
    return sets.get(path, path)
