"""Disk space, asked for before anything is written: free bytes, preallocation, full-disk errors.

Sizes come from the caller. A full disk always ends as NoSpace, with bytes needed and bytes free.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from raypipe.errors import NoSpace, StoreError
from raypipe.units import format_bytes

log = logging.getLogger(__name__)

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE}


def nearest_parent(path: Path) -> Path:
    """``path`` or its closest ancestor that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def may_write(folder: Path) -> bool:
    """Whether ``folder`` is one in which this process may make files."""
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def free_bytes(path: Path) -> int | None:
    """Bytes that an unprivileged process may still write to the filesystem of ``path``.

    None where the filesystem does not tell (ramfs and some FUSE mounts report 0 blocks in all).
    """
    stat = os.statvfs(nearest_parent(path))
    return stat.f_bavail * stat.f_frsize if stat.f_blocks else None


def require_space(needs: Mapping[Path, int]) -> None:
    """Check that all of ``needs`` (path -> bytes still to be written) fit together.

    Paths on one filesystem are summed: two stores that fit one by one may not fit both.
    Raises NoSpace, naming the folder, the bytes needed and the bytes free.
    """
    devices: dict[int, tuple[Path, int]] = {}
    for path, need in needs.items():
        parent = nearest_parent(path)
        device = parent.stat().st_dev
        first, total = devices.get(device, (parent, 0))
        devices[device] = first, total + need
    for parent, total in devices.values():
        free = free_bytes(parent)
        if free is None:
            log.warning("%s does not say how much space is free: it may fill up", parent)
        elif total > free:
            raise NoSpace(_no_space_text(parent, total, free))


def preallocate(fd: int, path: Path, size_bytes: int) -> str:
    """Reserve ``size_bytes`` for the open file, so that a later write cannot find the disk full.

    Returns ``"fallocate"``, or ``"sparse: WHY"`` where the filesystem has no fallocate: the file
    is then only given its size, after a check of the free space. On a full disk the file is cut
    back to the size it had, and NoSpace is raised.
    """
    before = os.fstat(fd)
    need = max(0, size_bytes - before.st_blocks * 512)
    code = _fallocate(fd, size_bytes)
    if code in _FULL:
        os.ftruncate(fd, before.st_size)
        raise NoSpace(_no_space_text(path, need, free_bytes(path)))
    if code in _UNSUPPORTED:
        require_space({path: need})
        os.ftruncate(fd, max(before.st_size, size_bytes))
        why = f"sparse: fallocate says {os.strerror(code)!r}"
        log.warning("%s is not preallocated (%s): the disk may fill up later", path, why)
        return why
    if code:
        raise OSError(code, os.strerror(code), str(path))
    return "fallocate"


def _fallocate(fd: int, size_bytes: int) -> int:
    """errno of fallocate(2) over the first ``size_bytes``, 0 when done.

    The system call itself, not `os.posix_fallocate`: where the filesystem has none (ZFS, NFSv3),
    glibc's posix_fallocate silently writes a byte into every block, 7 million of them for one
    29 GB shard.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        call = libc.fallocate64 if hasattr(libc, "fallocate64") else libc.fallocate
    except AttributeError:  # not Linux
        return errno.EOPNOTSUPP
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while call(fd, 0, 0, size_bytes) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            return code
    return 0


@contextmanager
def explain_os_errors(path: Path, need_bytes: int) -> Iterator[None]:
    """Inside, a full disk becomes NoSpace and a refused write StoreError, both naming ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            why = f" ({os.strerror(error.errno)})" if error.errno != errno.ENOSPC else ""
            text = _no_space_text(path, need_bytes, free_bytes(path))
            raise NoSpace(text + why) from error
        if error.errno in _REFUSED:
            why = os.strerror(error.errno)
            raise StoreError(f"{error.filename or path} cannot be written ({why})") from error
        raise


def _no_space_text(path: Path, need: int, free: int | None) -> str:
    what = f"{path} needs {need} bytes ({format_bytes(need)})"
    if free is None:
        return f"{what}, the filesystem has no more; free some or choose another folder"
    return (
        f"{what}, {free} ({format_bytes(free)}) are free, {format_bytes(max(0, need - free))} too "
        "few; free some or choose another folder"
    )
