"""Writes that finish or never happened: the few file operations on which crash safety rests.

Covers short writes, file and directory fsync, and replace-by-rename. What is written, and in which
order, is decided by the neighbours (`run`, `writer`); what a full disk means is said in `space`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write every byte of ``data`` at ``offset``, however short each single write comes out."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        if written <= 0:
            raise OSError(f"pwrite of {len(view)} bytes at {offset} wrote none")
        view, offset = view[written:], offset + written


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write every byte of ``data`` at the descriptor's own position."""
    view = memoryview(data)
    while view:
        written = os.write(fd, view)
        if written <= 0:
            raise OSError(f"write of {len(view)} bytes wrote none")
        view = view[written:]


def fsync_dir(folder: Path) -> None:
    """Make the names in ``folder`` (created, renamed, removed) survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dirs(folder: Path) -> None:
    """``mkdir -p`` whose every new level survives a power cut."""
    absent = []
    while not folder.is_dir():
        absent.append(folder)
        folder = folder.parent
    for level in reversed(absent):
        level.mkdir(exist_ok=True)
        fsync_dir(level.parent)


def write_atomic(path: Path, chunks: bytes | Iterable[bytes]) -> None:
    """Replace ``path`` as a whole: after a crash it holds the old bytes or all the new ones.

    One writer at a time, which the run lock ensures: the temporary name is fixed, so that what a
    crash leaves behind is overwritten by the next attempt instead of piling up.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for chunk in (chunks,) if isinstance(chunks, bytes) else chunks:
            write_all(fd, chunk)
        os.fsync(fd)
    except BaseException:
        os.close(fd)
        temporary.unlink(missing_ok=True)
        raise
    os.close(fd)
    temporary.replace(path)
    fsync_dir(path.parent)


def move(source: Path, target: Path) -> None:
    """Rename within one folder, durably."""
    source.replace(target)
    fsync_dir(target.parent)


def remove(paths: Iterable[Path]) -> None:
    """Unlink what is there of ``paths``, then make that survive, one fsync a folder."""
    folders = set()
    for path in paths:
        if path.exists() or path.is_symlink():
            path.unlink(missing_ok=True)
            folders.add(path.parent)
    for folder in sorted(folders):
        fsync_dir(folder)
