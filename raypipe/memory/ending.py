"""What the watch needs of the system to end a process in time: two ways to kill, and its own priority."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import closing, suppress

from raypipe.memory.probe import ProcessProbe


def kill_by_number(pid: int, start_ticks: int) -> None:
    """End a process by its number, looked at once more just before; no error when it is gone."""
    with suppress(ProcessLookupError), closing(ProcessProbe(pid)) as probe:
        if probe.start_ticks == start_ticks:
            os.kill(pid, signal.SIGKILL)


def kill_by_pidfd(pidfd: int) -> None:
    """End the process that ``pidfd`` is of, whatever has become of its number."""
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def raise_priority() -> str:
    """Let this thread run before all ordinary ones; returns in words what came of it."""
    try:
        # Ray starts its workers at nice 15: behind busy neighbours a look can come 50 ms late.
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
        return "real-time priority"
    except (AttributeError, OSError):
        pass
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -10)
        return "nice -10"
    except OSError as error:
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        return (
            f"ordinary priority, nice {nice} ({error.strerror}): on a node with busy cores a "
            "process may pass its limit for longer; CAP_SYS_NICE would allow more"
        )
