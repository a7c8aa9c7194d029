"""One fit a run folder: a lock that the kernel drops when its holder dies, and who holds it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from raypipe.errors import StoreLocked

_LOCK, _OWNER = ".fit.lock", ".fit.owner"


@contextmanager
def hold_run(run_dir: Path) -> Iterator[None]:
    """Keep every other fit out of ``run_dir`` for the length of the block.

    The folder's own files only, not those of folders below it: each of them is held by itself.
    Raises StoreLocked at once, naming the holder. On NFS the lock holds from version 4 on.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / _LOCK, timeout=0)
    owner = run_dir / _OWNER
    try:
        lock.acquire()
    except Timeout:
        holder = "another process"
        with suppress(OSError):
            holder = owner.read_text(encoding="utf-8")
        raise StoreLocked(
            f"{run_dir} is being fitted by {holder}; wait for it, or use another run folder"
        ) from None
    try:
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        owner.write_text(f"pid {os.getpid()} on {platform.node()} since {started}", "utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
