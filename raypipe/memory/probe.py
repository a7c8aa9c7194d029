"""Reads what a process holds and the kernel cannot reclaim: RssAnon = statm (resident - shared).

RSS, PSS and USS all charge a process for clean mapped pages too, and would blame a reader of a
large store for pages that cost nobody anything. Elsewhere than on Linux psutil's USS stands in,
and says more than RssAnon.
"""

from __future__ import annotations

import os
from pathlib import Path


def anon_bytes(pid: int | None = None) -> int:
    """Anonymous resident bytes of process ``pid`` (default: this one).

    Raises ProcessLookupError when there is no such process.
    """
    statm = Path(f"/proc/{pid or os.getpid()}/statm")
    if not Path("/proc/self/statm").exists():
        return _uss_bytes(pid)
    try:
        fields = statm.read_text().split()
    except FileNotFoundError:
        raise ProcessLookupError(f"no process {pid}") from None
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")


def _uss_bytes(pid: int | None) -> int:
    import psutil

    return int(psutil.Process(pid).memory_full_info().uss)
