"""Files of one OME-TIFF image: planes of one stack, each in a file of its own.

The first page's OME-XML, or the metadata file that it names (BinaryOnly), lists the files of each <Image>,
by name and UUID. Files of one <Image> are a set; the fields of a plate or the positions of a slide are
<Image>s of their own, and no set. Stacks in numbered files (z001.tif) say nothing of each other, and look
like pictures in numbered files: they are not told apart here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import unescape
from pathlib import Path

import xxhash

_TIFF = (".tif", ".tiff")
_ROOT = re.compile(r"<(?:\w+:)?OME\b[^>]*>")
_OWN = re.compile(r"\bUUID\s*=\s*[\"']([^\"']+)")
_IMAGE = re.compile(r"<(?:\w+:)?Image\b[^>]*(?<!/)>(.*?)</(?:\w+:)?Image\s*>", re.DOTALL)
_UUID = re.compile(r"<(?:\w+:)?UUID\b([^>]*)>\s*([^<\s]+)")
_FILE_NAME = re.compile(r"\bFileName\s*=\s*[\"']([^\"']+)")
_SELF = re.compile(r"<(?:\w+:)?TiffData\b[^>]*(?:/>|>\s*</)")
_BINARY_ONLY = re.compile(r"<(?:\w+:)?BinaryOnly\b[^>]*\bMetadataFile\s*=\s*[\"']([^\"']+)")


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What an OME-XML lists. groups : paths and UUIDs of each <Image> of several files; grouped : all of
    them; here : the first of each group that has planes in the very file of the XML; named : every path,
    of any <Image>.
    """

    groups: tuple[tuple[str, ...], ...]
    grouped: frozenset[str]
    here: tuple[str, ...]
    named: frozenset[str]


def sets_of(paths: Iterable[Path]) -> dict[Path, Path]:
    """The first file of its set, for each of ``paths`` that shares one with another."""
    members = [path for path in dict.fromkeys(paths) if path.suffix.lower() in _TIFF]
    if len(members) < 2:
        return {}
    folders = {folder: str(folder.resolve()) for folder in {path.parent for path in members}}
    sets = _Sets()
    for path in members:
        sets.add(path, folders[path.parent])
    found: dict[str, list[Path]] = {}
    for path in members:
        found.setdefault(sets.root(_at(folders[path.parent], path.name)), []).append(path)
    return {path: min(one) for one in found.values() if len(one) > 1 for path in one}


class _Sets:
    """Names, united where an <Image> has them both; each list is read once, however many files have it."""

    def __init__(self) -> None:
        self._owner: dict[str, str] = {}
        self._lists: dict[tuple[str, str], Listing] = {}

    def add(self, path: Path, folder: str) -> None:
        """Unite what the file's metadata list, and the file with the <Image>s that it is of."""
        xml = _description(path)
        root = _ROOT.search(xml)
        if root is None:
            return
        own, master = _at(folder, path.name), _BINARY_ONLY.search(xml)
        listing = self._master(_at(folder, master[1])) if master else self._own(xml, root, folder)
        uuid = _OWN.search(root[0])
        # A name tells more than a UUID, which some writers give to all files alike.
        if uuid and own not in listing.named and uuid[1] in listing.grouped:
            self._unite((uuid[1], own))
        if not master:
            for first in listing.here:
                self._unite((first, own))

    def root(self, name: str) -> str:
        """The name that stands for all that are united with it."""
        owner = self._owner
        while owner.setdefault(name, name) != name:
            owner[name] = name = owner[owner[name]]
        return name

    def _own(self, xml: str, root: re.Match[str], folder: str) -> Listing:
        # Without the root, which has the file's own UUID, the files of a set say the same.
        text = xml[root.end() :]
        return self._listed(text, folder, (folder, xxhash.xxh3_128_hexdigest(text.encode())))

    def _master(self, path: str) -> Listing:
        kept = self._lists.get((path, ""))
        return kept or self._listed(_metadata(Path(path)), str(Path(path).parent), (path, ""))

    def _listed(self, xml: str, folder: str, key: tuple[str, str]) -> Listing:
        if key not in self._lists:
            self._lists[key] = listing_of(xml, folder)
            for group in self._lists[key].groups:
                self._unite(group)
        return self._lists[key]

    def _unite(self, names: Iterable[str]) -> None:
        first, *others = names
        for name in others:
            self._owner[self.root(name)] = self.root(first)


def listing_of(xml: str, folder: str) -> Listing:
    """The files that each <Image> of an OME-XML in ``folder`` lists."""
    images = [(_files(block, folder), bool(_SELF.search(block))) for block in _IMAGE.findall(xml)]
    files_of: dict[str, set[str]] = {}
    for files, _ in images:
        for path, uuid in files:
            files_of.setdefault(uuid, set()).add(path)
    groups, here = [], []
    for files, itself in images:
        if len({path or uuid for path, uuid in files}) + itself < 2:
            continue
        # A UUID that stands beside several names tells no file.
        uuids = (uuid for path, uuid in files if not path or len(files_of[uuid]) == 1)
        groups.append(tuple(dict.fromkeys((*(path for path, _ in files if path), *uuids))))
        here += [groups[-1][0]] if itself else []
    named = frozenset(path for files, _ in images for path, _ in files if path)
    grouped = frozenset(name for group in groups for name in group)
    return Listing(groups=tuple(groups), grouped=grouped, here=tuple(here), named=named)


def _files(block: str, folder: str) -> list[tuple[str, str]]:
    """(path or "", UUID) of each file that the block names, each once."""
    found: dict[tuple[str, str], None] = {}
    for more, uuid in _UUID.findall(block):
        name = _FILE_NAME.search(more)
        found[_at(folder, unescape(name[1])) if name else "", uuid] = None
    return list(found)


def _at(folder: str, name: str) -> str:
    """The path, of words alone: to ask the disk for each name would take N x N questions."""
    return os.path.normpath(Path(folder, name))


def _metadata(path: Path) -> str:
    """The OME-XML that BinaryOnly files refer to, "" where it cannot be read: each is then a source."""
    from tifffile import TiffFileError

    try:
        if path.suffix.lower() in _TIFF:
            return _description(path)
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    except (OSError, TiffFileError):
        return ""


def _description(path: Path) -> str:
    """The OME-XML of the file, "" where it has none."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        return str(file.pages[0].description or "") if file.is_ome else ""


def source_of(path: Path, sets: Mapping[Path, Path]) -> Path:
    """The file itself, or the first of its set."""
    return sets.get(path, path)
