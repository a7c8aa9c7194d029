"""One process under watch: its descriptors, and how often it has to be looked at.

The interval follows from the distance to the hard limit: nobody can get there from one look to the
next with all cores. Between two looks that call for something lies a range of pages in which all
stays as it is; a look that finds the process inside it is a single comparison.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

from raypipe.memory.policy import Limits
from raypipe.memory.probe import ENFORCES, ProcessProbe
from raypipe.memory.registration import Registration
from raypipe.memory.slot import Slot
from raypipe.memory.statm import PAGE_BYTES

# New pages are zeroed by the core that touches them: 3 GiB/s on the machine this was written on, 10
# on the fastest. What passes the hard limit by more than that meets the margin under the budget.
CORE_BYTES_PER_S = 12 * 1024**3
FASTEST_BYTES_PER_S = min(64 * 1024**3, CORE_BYTES_PER_S * (os.cpu_count() or 64))
LONGEST_TICKS = 16
#: With looks this near the watch stays in compiled code, which hears nobody in between.
NEAR_TICKS = 2


@dataclass(kw_only=True)
class Watched:
    """One process and what is known of it.

    calm_from, calm_below : usages in between call for nothing; every : ticks from look to look;
    due : the tick of the next one; quiet_from, quiet_below : anonymous pages in between call for
    nothing but the next look; extra_bytes : what is charged beside them.
    """

    registration: Registration
    limits: Limits
    probe: ProcessProbe
    pidfd: int
    slot: Slot
    opened: ExitStack
    calm_from: int = 0
    calm_below: int = 0
    every: int = 1
    due: int = 0
    quiet_from: int = 1
    quiet_below: int = 0
    pressed_since: float | None = None
    looked_at: float = field(default_factory=time.monotonic)
    extra_bytes: int = 0
    pinned_bytes: int = 0

    def charge_beside(self, pinned_bytes: int, shm_bytes: int) -> bool:
        """Pinned host memory and shared tensors, from now on; returns whether they changed."""
        self.pinned_bytes = pinned_bytes
        if self.extra_bytes == pinned_bytes + shm_bytes:
            return False
        self.extra_bytes = pinned_bytes + shm_bytes
        self.quiet_below = 0  # those were pages beside the extra bytes of before
        return True

    def pace(self, usage_bytes: int, reach_bytes: int) -> None:
        """Set interval and quiet range; reach_bytes : what can be allocated in one tick."""
        hard = self.limits.hard_bytes
        self.every = max(1, min(LONGEST_TICKS, (hard - usage_bytes) // reach_bytes))
        # One step of slack: at a boundary a process would be looked at whole again and again.
        far = self.every == LONGEST_TICKS
        low = max(self.calm_from, 0 if far else hard - (self.every + 2) * reach_bytes)
        high = min(self.calm_below, hard - (self.every if self.every > 1 else 0) * reach_bytes)
        self.quiet_from = max(1, (low - self.extra_bytes) // PAGE_BYTES + 1)
        self.quiet_below = (high - self.extra_bytes) // PAGE_BYTES

    def seen(self, tick: int, now: float) -> None:
        """Looked at. Multiples of the interval: those at one distance share their wake-ups."""
        self.looked_at = now
        self.due = (tick // self.every + 1) * self.every


def open_watched(
    registration: Registration, probe_of: Callable[[int], ProcessProbe] = ProcessProbe
) -> Watched:
    """Raises ProcessLookupError when it has ended, also if its number is another's now."""
    with ExitStack() as opened:
        pidfd = open_pidfd(registration.pid) if ENFORCES else -1
        if pidfd >= 0:
            opened.callback(os.close, pidfd)
        probe = opened.enter_context(closing(probe_of(registration.pid)))
        # Read after pidfd_open: if the number changed hands before or between, this differs.
        if probe.start_ticks != registration.start_ticks:
            raise ProcessLookupError(
                f"process {registration.pid} began at {probe.start_ticks}, not at "
                f"{registration.start_ticks}: it is another one"
            )
        slot = opened.enter_context(closing(Slot(registration.slot_path)))
        return Watched(
            registration=registration,
            limits=Limits.of(registration.budget_bytes),
            probe=probe,
            pidfd=pidfd,
            slot=slot,
            # Told by a watch before this one: it is for us to take back.
            pressed_since=time.monotonic() if slot.pressure else None,
            opened=opened.pop_all(),
        )


def open_pidfd(pid: int) -> int:
    """A descriptor of that process, -1 where there are none: conda's Python lacks the call, kernels
    before 5.3 and some containers refuse it. Raises ProcessLookupError when it has ended.
    """
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except (AttributeError, OSError):
        return -1
