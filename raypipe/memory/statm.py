"""Reads one process again and again: statm on a held descriptor, psutil's USS elsewhere.

RssAnon = statm (resident - shared). RSS, PSS and USS all charge a process for clean mapped pages
too, and would blame a reader of a large store for pages that cost nobody anything. Elsewhere than
on Linux USS stands in: it is read to measure and to warn, nobody is stopped by it (``ENFORCES`` is
False). What else a process is charged for: ``probe``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

ENFORCES = Path("/proc/self/statm").exists()
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Reading(NamedTuple):
    """RssAnon, and pages that are backed by files or shared memory (RssFile + RssShmem)."""

    anon_bytes: int
    file_bytes: int


class ProcessProbe:
    """Reads one process again and again: statm on a held descriptor, about a microsecond.

    The descriptor belongs to the process, not to its number: when that number goes to another
    process, ``read`` still raises ProcessLookupError. Raises it also when made, for no process.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = -1
        self._process: Any = None
        if ENFORCES:
            self._open()
        else:
            self._process = _psutil_process(pid)
            self.start_ticks = int(self._process.create_time() * 100)

    def _open(self) -> None:
        try:
            self._fd = os.open(f"/proc/{self.pid}/statm", os.O_RDONLY | os.O_CLOEXEC)
            self.start_ticks = _start_ticks(self.pid)
            self.read()  # still there: the start time was read of the process that the fd is of
        except FileNotFoundError:
            self.close()
            raise ProcessLookupError(f"no process {self.pid}") from None
        except BaseException:
            self.close()
            raise

    def read(self) -> Reading:
        """What it holds now. Raises ProcessLookupError when it has ended, also if not reaped."""
        if self._process is not None:
            return _psutil_reading(self._process)
        fields = os.pread(self._fd, 128, 0).split(None, 3)
        if fields[0] == b"0":  # no address space: a zombie
            raise ProcessLookupError(f"process {self.pid} has ended")
        shared = int(fields[2])
        return Reading((int(fields[1]) - shared) * PAGE_BYTES, shared * PAGE_BYTES)

    def anon_pages(self) -> int:
        """The cheapest look: anonymous pages of ``PAGE_BYTES``; 0 says only that ``read`` is due,
        as it is of a process that has ended, and elsewhere than on Linux.
        """
        if self._process is not None:
            return 0
        fields = os.pread(self._fd, 128, 0).split(None, 3)
        return int(fields[1]) - int(fields[2])

    def fileno(self) -> int:
        """The descriptor of its statm; -1 elsewhere than on Linux."""
        return self._fd

    def close(self) -> None:
        """Let go of the descriptor; ``read`` is over."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> ProcessProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def anon_bytes(pid: int | None = None) -> int:
    """Anonymous resident bytes of process ``pid`` (default: this one), read once.

    Raises ProcessLookupError when there is no such process.
    """
    with ProcessProbe(os.getpid() if pid is None else pid) as probe:
        return probe.read().anon_bytes


def _start_ticks(pid: int) -> int:
    """Field 22 of stat; the name in field 2 may hold spaces and brackets."""
    text = Path(f"/proc/{pid}/stat").read_bytes()
    return int(text[text.rindex(b")") + 2 :].split()[19])


def _psutil_process(pid: int) -> Any:
    import psutil

    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        raise ProcessLookupError(f"no process {pid}") from None


def _psutil_reading(process: Any) -> Reading:
    import psutil

    try:
        info = process.memory_full_info()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        raise ProcessLookupError(f"process {process.pid} has ended") from None
    return Reading(int(info.uss), max(0, int(info.rss) - int(info.uss)))
