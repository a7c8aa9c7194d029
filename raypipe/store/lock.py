"""One run owns a store: the run lock, and the record of who holds it.

The lock is what counts; the record (``*.owner.json``) names the owner to whoever is refused, and
keeps the fencing epoch, which only grows.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import psutil

from raypipe.errors import StoreLocked
from raypipe.store.durable import write_atomic
from raypipe.store.flocks import Flock
from raypipe.store.layout import ShardPaths

_PATIENCE_S = 0.3  # the owner between taking the lock and writing its record


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The run that holds, or last held, a store. Times are ISO 8601, UTC."""

    pid: int
    host: str
    run_id: str
    command: str
    epoch: int
    started: str
    process_started: float
    released: str | None = None

    @classmethod
    def me(cls, run_id: str, epoch: int) -> Owner:
        """This process."""
        return cls(
            pid=os.getpid(),
            host=socket.gethostname(),
            run_id=run_id,
            command=shlex.join(sys.orig_argv),
            epoch=epoch,
            started=utc_now(),
            process_started=psutil.Process().create_time(),
        )

    @classmethod
    def read(cls, path: Path) -> Owner | None:
        """The record at ``path``; None when there is none that can be read."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return cls(**json.loads(path.read_bytes()))
        return None

    def write(self, path: Path) -> None:
        """Put the record at ``path``, durably."""
        write_atomic(path, json.dumps(asdict(self), indent=1).encode() + b"\n")

    def release(self, path: Path) -> None:
        """Note that the owner let go in good order."""
        replace(self, released=utc_now()).write(path)

    @property
    def alive(self) -> bool | None:
        """Whether the process still runs; None where that cannot be known (another host)."""
        if self.released:
            return False
        if self.host != socket.gethostname():
            return None
        try:
            started = psutil.Process(self.pid).create_time()
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return None
        return abs(started - self.process_started) < 1.0  # else the pid was given out again

    def __str__(self) -> str:
        who = f"pid {self.pid} on {self.host} since {self.started}"
        return f"{who} (run {self.run_id}: {self.command})"


def utc_now() -> str:
    """Now, as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def take_lock(paths: ShardPaths) -> Flock:
    """Take the run lock of a shard, or raise StoreLocked that names the owner."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        lock = Flock(paths.lock)
        if lock.try_exclusive():
            if lock.is_current():  # sealing removes the file: it may be gone since we opened it
                return lock
            lock.close()
            continue
        lock.close()
        owner = Owner.read(paths.owner)
        if (owner and owner.alive is not False) or time.monotonic() > deadline:
            raise StoreLocked(
                f"{paths.final} is being written by {owner or 'a process not yet on record'}; "
                "wait for it or stop it, then run again"
            )
        time.sleep(0.02)
