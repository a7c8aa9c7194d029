"""The watch over the processes of one node: reads them, tells them, ends them.

How often a process is looked at follows from how far it is from its hard limit: every 5 ms once it
could get there in that time with all cores, and down to every 80 ms further away. Sixteen looks
every 5 ms would cost 2 to 3 % of a core wherever they are; waking up 200 times a second alone takes
0.6 % of a busy core here and 1.4 % of an idle one, and most looks would be of processes far away.

At the hard limit it kills first and writes the verdict after, on another thread: an fsync takes as
long as the disk or the network share likes, 10 MB a millisecond at 10 GB/s, while the other
processes go unwatched. Before the kill the cause goes into the slot, by a store to memory
that outlives this process: a watch that dies in between leaves it to its successor
(``cluster.node_memory``). Only a node that loses power in those milliseconds loses the cause.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from raypipe.memory.clerk import Clerk, verdict_on
from raypipe.memory.policy import Limits, decide
from raypipe.memory.probe import ENFORCES, ProcessProbe, Reading, torch_shm_bytes
from raypipe.memory.registration import Registration
from raypipe.memory.slot import Sentence, Slot
from raypipe.memory.statm import PAGE_BYTES
from raypipe.memory.verdict import Verdict

POLL_S = 0.005
# New pages are zeroed by the core that touches them: 3 GiB/s on the machine this was written on, 10
# on the fastest. What passes the hard limit by more than that meets the margin under the budget.
CORE_BYTES_PER_S = 12 * 1024**3
FASTEST_BYTES_PER_S = min(64 * 1024**3, CORE_BYTES_PER_S * (os.cpu_count() or 64))
LONGEST_TICKS = 16
# Pinned memory and shared tensors: only the process, and a folder listing, can say them.
EXTRA_EVERY_S = 0.1


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


def kill_by_number(pid: int, start_ticks: int) -> None:
    """End a process by its number, looked at once more just before; no error when it is gone."""
    with suppress(ProcessLookupError), closing(ProcessProbe(pid)) as probe:
        if probe.start_ticks == start_ticks:
            os.kill(pid, signal.SIGKILL)


def kill_by_pidfd(pidfd: int) -> None:
    """End the process that ``pidfd`` is of, whatever has become of its number."""
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)


@dataclass(kw_only=True)
class _Watched:
    """One process and what is known of it.

    calm_from, calm_below : usages in between call for nothing; due : the tick of its next look;
    quiet_from, quiet_below : anonymous pages in between call for nothing but a look at the next
    tick. Sixteen such processes are looked at 3200 times a second.
    """

    registration: Registration
    limits: Limits
    probe: ProcessProbe
    pidfd: int
    slot: Slot
    opened: ExitStack
    calm_from: int = 0
    calm_below: int = 0
    quiet_from: int = 1
    quiet_below: int = 0
    pressed_since: float | None = None
    looked_at: float = field(default_factory=time.monotonic)
    extra_bytes: int = 0
    pinned_bytes: int = 0
    due: int = 0


class Watch:
    """Watches what is registered, by ``tick`` or, after ``start``, on a thread of its own.

    on_gone    : told of a process that has ended, once, when its memory is free
    on_verdict : told of each verdict, after it was written
    Elsewhere than on Linux processes are measured and told, never killed.
    """

    def __init__(
        self,
        *,
        poll_s: float = POLL_S,
        kill: Callable[[int], None] = kill_by_pidfd,
        on_gone: Callable[[Registration], None] = lambda registration: None,
        on_verdict: Callable[[Verdict], None] = lambda verdict: None,
        probe: Callable[[int], ProcessProbe] = ProcessProbe,
    ) -> None:
        self.poll_s = poll_s if ENFORCES else max(poll_s, 1.0)  # psutil's USS takes milliseconds
        self.priority = "not started"
        self._kill, self._on_gone, self._on_verdict = kill, on_gone, on_verdict
        self._probe = probe
        self._watched: dict[int, _Watched] = {}
        self._lock = threading.Lock()
        self._reach_bytes = int(FASTEST_BYTES_PER_S * self.poll_s)
        self._tick, self._extra_due = 0, 0.0
        # A bare lock: waiting for an Event costs as much as four looks, 200 times a second.
        self._bell, self._rung = threading.Lock(), False
        self._bell.acquire()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._clerk = Clerk(on_verdict)

    @property
    def registrations(self) -> tuple[Registration, ...]:
        """What is watched now."""
        with self._lock:
            return tuple(one.registration for one in self._watched.values())

    def register(self, registration: Registration) -> None:
        """Watch a process from now on; a second registration of it replaces the first.

        Raises ProcessLookupError when it has ended, also if its number is another's now.
        """
        watched = self._open(registration)
        with self._lock:
            before = self._watched.pop(registration.pid, None)
            self._watched[registration.pid] = watched
        if before is not None:
            before.opened.close()
        self._ring()

    def unregister(self, pid: int) -> None:
        """Look at it no more; an unknown pid is nobody."""
        with self._lock:
            watched = self._watched.pop(pid, None)
        if watched is not None:
            watched.opened.close()

    def tick(self, ticks: int = 1) -> int:
        """Look at all that are due, ``ticks`` poll intervals after the last call.

        Returns in how many the next one is.
        """
        gone, now = [], time.monotonic()
        with self._lock:
            tick = self._tick = self._tick + ticks
            if now >= self._extra_due:
                self._read_extra(now)
            due = tick + LONGEST_TICKS
            for one in self._watched.values():
                if one.due <= tick:
                    try:
                        if one.quiet_from <= one.probe.anon_pages() < one.quiet_below:
                            one.due, one.looked_at = tick + 1, now
                        else:
                            self._look(one, now)
                    except ProcessLookupError:
                        gone.append(one)
                        continue
                if one.due < due:
                    due = one.due
            for one in gone:
                del self._watched[one.registration.pid]
        for one in gone:
            one.opened.close()
            self._on_gone(one.registration)
        return due - tick

    def start(self, on_failure: Callable[[], None] = lambda: None) -> None:
        """Tick on a thread of raised priority; on_failure : called if that thread ever fails."""
        ready = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(ready, on_failure), name="raypipe-memory-watch", daemon=True
        )
        self._thread.start()
        ready.wait()

    def stop(self) -> None:
        """End the thread, write what is still to be written, let go of everything."""
        self._stopping = True
        self._ring()
        if self._thread is not None:
            self._thread.join()
        self._clerk.close()
        for registration in self.registrations:
            self.unregister(registration.pid)

    def write(self, verdict: Verdict, folder: Path | None) -> None:
        """Have a verdict written after those before it."""
        self._clerk.write(verdict, folder)

    def flush(self) -> None:
        """Wait until all verdicts so far are on the disk."""
        self._clerk.flush()

    def _ring(self) -> None:
        """Wake the thread: there may be somebody near a limit."""
        with self._lock:
            if not self._rung:
                self._rung = True
                self._bell.release()

    def _open(self, registration: Registration) -> _Watched:
        with ExitStack() as opened:
            pidfd = open_pidfd(registration.pid) if ENFORCES else -1
            if pidfd >= 0:
                opened.callback(os.close, pidfd)
            probe = opened.enter_context(closing(self._probe(registration.pid)))
            # Read after pidfd_open: if the number changed hands before or between, this differs.
            if probe.start_ticks != registration.start_ticks:
                raise ProcessLookupError(
                    f"process {registration.pid} began at {probe.start_ticks}, not at "
                    f"{registration.start_ticks}: it is another one"
                )
            slot = opened.enter_context(closing(Slot(registration.slot_path)))
            return _Watched(
                registration=registration,
                limits=Limits.of(registration.budget_bytes),
                probe=probe,
                pidfd=pidfd,
                slot=slot,
                opened=opened.pop_all(),
            )

    # ---- the thread's side

    def _run(self, ready: threading.Event, on_failure: Callable[[], None]) -> None:
        try:
            self.priority = raise_priority()
            ready.set()
            wait = 1
            while not self._stopping:
                if self._bell.acquire(timeout=wait * self.poll_s):
                    self._rung = False
                wait = self.tick(wait)
        except BaseException:
            ready.set()
            on_failure()
            raise

    def _read_extra(self, now: float) -> None:
        """Once for all, and rarely: listing a folder costs as much as ten looks."""
        self._extra_due = now + EXTRA_EVERY_S
        sharing = pids_with_torch_shm()
        for pid, one in self._watched.items():
            one.slot.beat()
            one.pinned_bytes = one.slot.pinned_bytes
            one.extra_bytes = one.pinned_bytes + (torch_shm_bytes(pid) if pid in sharing else 0)
            one.quiet_below = 0  # those were pages beside the extra bytes of before

    def _look(self, one: _Watched, now: float) -> None:
        """Raises ProcessLookupError when it has ended. Its cost is what watching costs."""
        reading = one.probe.read()
        usage = reading.anon_bytes + one.extra_bytes
        if not one.calm_from <= usage < one.calm_below:
            self._act(one, usage, reading, now)
        one.looked_at = now
        headroom = one.limits.hard_bytes - usage
        near = headroom < 2 * self._reach_bytes
        one.due = self._tick + 1 if near else self._next_look(headroom)
        if near:
            low = max(one.calm_from, one.limits.hard_bytes - 2 * self._reach_bytes)
            high = min(one.calm_below, one.limits.hard_bytes)
            one.quiet_from = max(1, (low - one.extra_bytes) // PAGE_BYTES + 1)
            one.quiet_below = (high - one.extra_bytes) // PAGE_BYTES
        else:
            one.quiet_below = 0

    def _act(self, one: _Watched, usage_bytes: int, reading: Reading, now: float) -> None:
        limits, was_pressed = one.limits, one.pressed_since is not None
        decision = decide(usage_bytes, limits, was_pressed)
        if decision.pressed != was_pressed:
            one.pressed_since = now if decision.pressed else None
            one.slot.pressure = decision.pressed
        one.calm_from = limits.resume_bytes if decision.pressed else 0
        one.calm_below = limits.hard_bytes if decision.pressed else limits.soft_bytes
        if decision.kill and ENFORCES:
            one.calm_from, one.calm_below = 0, sys.maxsize  # nothing is left to be done to it
            self._end(one, reading, now)

    def _next_look(self, headroom_bytes: int) -> int:
        """The tick before which a process with that much headroom cannot use it up.

        Multiples of the step: processes at one distance share their wake-ups.
        """
        step = max(1, min(LONGEST_TICKS, headroom_bytes // self._reach_bytes))
        return (self._tick // step + 1) * step

    def _end(self, one: _Watched, reading: Reading, now: float) -> None:
        shm_bytes = one.extra_bytes - one.pinned_bytes
        sentence = Sentence(
            time.time_ns(), reading.anon_bytes, one.pinned_bytes, shm_bytes, reading.file_bytes
        )
        one.slot.sentence = sentence
        if one.pidfd >= 0:
            self._kill(one.pidfd)
        else:
            kill_by_number(one.registration.pid, one.registration.start_ticks)
        pressed_s = now - one.pressed_since if one.pressed_since is not None else 0.0
        verdict = verdict_on(
            one.registration,
            one.slot,
            sentence,
            told_s=pressed_s,
            unseen_s=now - one.looked_at,
        )
        self._clerk.write(verdict, one.registration.verdict_dir)


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


def pids_with_torch_shm() -> set[int]:
    """Processes that have shared tensors by name: /dev/shm/torch_PID_*."""
    try:
        names = os.listdir("/dev/shm")  # noqa: PTH208
    except FileNotFoundError:
        return set()
    pids = (name.split("_")[1] for name in names if name.startswith("torch_"))
    return {int(pid) for pid in pids if pid.isdigit()}
