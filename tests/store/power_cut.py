"""A machine that loses power: after the k-th file operation, only what was synced is still there.

`PowerCut.run` calls a function with the file operations of `os` counted and watched. At the chosen
operation it raises `Blackout`; `restore` then rebuilds the folder as a disk may hold it: file
contents as of their last fsync, names as of their folder's last fsync. ``luck`` (a random
generator) lets any part of what was not synced survive as well, as a real disk may.
A ``luck`` of None is the worst case.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WATCHED = (
    "pwrite",
    "write",
    "ftruncate",
    "fsync",
    "fdatasync",
    "replace",
    "unlink",
    "mkdir",
    "rmdir",
)


class Blackout(BaseException):
    """The lights go out; no handler for ordinary errors may see it."""


class PowerCut:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: dict[int, dict[str, int]] = {}  # folder inode -> name -> inode, as on the disk
        self.contents: dict[int, bytes] = {}  # file inode -> bytes, as on the disk
        self._keep: list[int] = []  # open descriptors: an inode number must not be used again
        self.operations = 0
        self.dark = False
        for folder, _, files in os.walk(root):
            self._sync_names(Path(folder))
            for name in files:
                self._sync_content(Path(folder) / name)

    def run(self, work: Callable[[], Any], stop_at: int | None) -> bool:
        """Run ``work``; True if the power went out at operation ``stop_at``."""
        with pytest.MonkeyPatch.context() as patch:
            for name in WATCHED:
                patch.setattr(os, name, self._watch(name, getattr(os, name), stop_at))
            try:
                work()
            except Blackout:
                return True
        return False

    def _watch(
        self, name: str, real: Callable[..., Any], stop_at: int | None
    ) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            if self.dark:
                raise Blackout
            if self.operations == stop_at:
                self.dark = True
                self._note_current()
                raise Blackout
            self.operations += 1
            if name not in ("fsync", "fdatasync"):
                return real(*args, **options)
            path = Path(f"/proc/self/fd/{args[0]}").readlink()
            if path.is_dir():
                self._sync_names(path)
            else:
                self._sync_content(Path(f"/proc/self/fd/{args[0]}"))
            return None

        return operation

    def _inode(self, path: Path) -> int:
        self._keep.append(os.open(path, os.O_RDONLY))
        return os.fstat(self._keep[-1]).st_ino

    def _sync_names(self, folder: Path) -> None:
        self.names[self._inode(folder)] = {p.name: self._inode(p) for p in folder.iterdir()}

    def _sync_content(self, path: Path) -> None:
        self.contents[self._inode(path)] = path.read_bytes()

    def _note_current(self) -> None:
        """What the page cache holds when the power goes: some of it may have reached the disk."""
        self.top = self._inode(self.root)
        self.now_names: dict[int, dict[str, int]] = {}
        self.now_contents: dict[int, bytes] = {}
        for folder, _, files in os.walk(self.root):
            inside = {p.name: self._inode(p) for p in Path(folder).iterdir()}
            self.now_names[self._inode(Path(folder))] = inside
            for name in files:
                self.now_contents[inside[name]] = (Path(folder) / name).read_bytes()

    def restore(self, luck: random.Random | None) -> None:
        for fd in self._keep:
            os.close(fd)
        for path in self.root.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._restore_folder(self.top, self.root, luck)

    def _restore_folder(self, inode: int, path: Path, luck: random.Random | None) -> None:
        names = dict(self.names.get(inode, {}))
        now = self.now_names.get(inode, {})
        for group in _together(names, now):
            if luck and luck.random() < 0.5:
                for name in group:
                    names.pop(name, None)
                    names |= {name: now[name]} if name in now else {}
        for name, child in names.items():
            if child in self.names or child in self.now_names:
                (path / name).mkdir()
                self._restore_folder(child, path / name, luck)
            else:
                (path / name).write_bytes(self._content(child, luck))

    def _content(self, inode: int, luck: random.Random | None) -> bytes:
        synced = self.contents.get(inode, b"")
        if luck is None:
            return synced
        now = self.now_contents.get(inode, synced)
        size = luck.choice([len(synced), len(now), luck.randint(0, len(now))])
        size = max(size, min(len(synced), len(now)))
        blocks = range(0, size, 64)  # a disk's blocks are larger; smaller ones are nastier
        mixed = b"".join(
            (now if luck.random() < 0.5 else synced)[at : at + 64].ljust(64, b"\0") for at in blocks
        )
        return mixed[:size]


def _together(synced: dict[str, int], now: dict[str, int]) -> list[list[str]]:
    """Names whose changes survive together or not at all: a rename is atomic, the rest is not."""
    groups = {name: [name] for name in sorted({*synced, *now})}
    for old, inode in synced.items():
        for new in (name for name, other in now.items() if other == inode and name != old):
            groups[new] = groups[old] = sorted({*groups[new], *groups[old]})
    return [list(group) for group in sorted({tuple(group) for group in groups.values()})]
