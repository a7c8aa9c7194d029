"""The watch over the processes of one node: reads them, tells them, ends them.

How often a process is looked at follows from how far it is from its hard limit (``watched``): every
5 ms once it could get there in that time with all cores, and down to every 80 ms further away. Far
from all limits the looks are taken here; near one the thread is in compiled code (``stare``) until
somebody leaves the range in which nothing is to be done.

At the hard limit it kills first and writes the verdict after, on another thread: an fsync takes as
long as the disk or the network share likes, 10 MB a millisecond at 10 GB/s, while the other
processes go unwatched. Before the kill the cause goes into the slot, by a store to memory
that outlives this process: a watch that dies in between leaves it to its successor
(``cluster.node_memory``). Only a node that loses power in those milliseconds loses the cause.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.memory.clerk import Clerk, verdict_on
from raypipe.memory.ending import kill_by_number, kill_by_pidfd, raise_priority
from raypipe.memory.policy import decide
from raypipe.memory.probe import (
    ENFORCES,
    ProcessProbe,
    Reading,
    SharedTensors,
    torch_shm_bytes,
)
from raypipe.memory.registration import Registration
from raypipe.memory.slot import Sentence
from raypipe.memory.verdict import Verdict
from raypipe.memory.watched import (
    FASTEST_BYTES_PER_S,
    LONGEST_TICKS,
    NEAR_TICKS,
    Watched,
    open_watched,
)

POLL_S = 0.005
# Pinned memory and shared tensors: only the process, and a folder listing, can say them.
EXTRA_EVERY_S = 0.1
# A watch that takes over from a dead one has its processes back first.
COMPILE_AFTER_S = 2.0
EMPTY_TICKS = 200  # with nobody there: who comes rings
INTERPRETED, COMPILED = "interpreted", "compiled"


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
        self.looks, self.compile_after_s = INTERPRETED, COMPILE_AFTER_S
        self._kill, self._on_gone, self._on_verdict = kill, on_gone, on_verdict
        self._probe = probe
        self._watched: dict[int, Watched] = {}
        self._left: list[Watched] = []  # closed by the thread: it may be reading them
        self._lock = threading.Lock()
        self._reach_bytes = int(FASTEST_BYTES_PER_S * self.poll_s)
        self._tick, self._extra_due = 0, 0.0
        # A bare lock: waiting for an Event costs as much as four looks, 200 times a second.
        self._bell, self._rung = threading.Lock(), False
        self._bell.acquire()
        self._bell_seen_compiled = np.zeros(1, np.uint8)
        self._stare: Any = None
        self._compiling = False
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._sharing = SharedTensors()
        self._clerk = Clerk(on_verdict)

    @property
    def thread_id(self) -> int | None:
        """The system's number of the thread that looks, for those who measure it."""
        return self._thread.native_id if self._thread is not None else None

    @property
    def registrations(self) -> tuple[Registration, ...]:
        """What is watched now."""
        with self._lock:
            return tuple(one.registration for one in self._watched.values())

    def register(self, registration: Registration) -> None:
        """Watch a process from now on; a second registration of it replaces the first.

        Raises ProcessLookupError when it has ended, also if its number is another's now.
        """
        watched = open_watched(registration, self._probe)
        with self._lock:
            before = self._watched.pop(registration.pid, None)
            self._watched[registration.pid] = watched
        self._let_go(before)
        self._ring()
        if ENFORCES and self._thread is not None and not self._compiling:
            self._compiling = True
            later = threading.Timer(self.compile_after_s, self.compile)
            later.daemon = True
            later.start()

    def unregister(self, pid: int) -> None:
        """Look at it no more; an unknown pid is nobody."""
        with self._lock:
            watched = self._watched.pop(pid, None)
        self._let_go(watched)

    def tick(self, ticks: int = 1) -> int:
        """Look at all that are due, ``ticks`` poll intervals after the last call.

        Returns in how many the next one is.
        """
        gone, now = [], time.monotonic()
        with self._lock:
            left, self._left = self._left, []
            tick = self._tick = self._tick + ticks
            if now >= self._extra_due:
                self._read_extra(now)
            due = tick + (LONGEST_TICKS if self._watched else EMPTY_TICKS)
            for one in self._watched.values():
                if one.due <= tick:
                    try:
                        if not one.quiet_from <= one.probe.anon_pages() < one.quiet_below:
                            self._look(one, now)
                        one.seen(tick, now)
                    except ProcessLookupError:
                        gone.append(one)
                        continue
                if one.due < due:
                    due = one.due
            for one in gone:
                del self._watched[one.registration.pid]
        for one in left:
            one.opened.close()
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
            self._thread = None
        self._clerk.close()
        for one in self._left:
            one.opened.close()
        for registration in self.registrations:
            self.unregister(registration.pid)

    def compile(self) -> None:
        """Have looks near limits taken in compiled code; ``looks`` says what came of it.

        Done aside, soon after the first registration and not when somebody is near his limit:
        loading LLVM holds the GIL for tens of milliseconds at a time.
        """
        self._compiling = True
        try:
            from raypipe.memory.stare import stare

            nobody, rung = np.empty(0, np.int64), np.ones(1, np.uint8)
            stare(nobody.astype(np.int32), *[nobody] * 4, rung[:0], rung, 0, 1, 1)
            self._stare, self.looks = stare, COMPILED
        except Exception as error:  # no LLVM, an unknown processor: looks go on, and cost more
            self.looks = f"{INTERPRETED} ({type(error).__name__}: {error})"

    def write(self, verdict: Verdict, folder: Path | None) -> None:
        """Have a verdict written after those before it."""
        self._clerk.write(verdict, folder)

    def flush(self) -> None:
        """Wait until all verdicts so far are on the disk."""
        self._clerk.flush()

    def _ring(self) -> None:
        """Wake the thread: there may be somebody near a limit."""
        with self._lock:
            self._bell_seen_compiled[0] = 1
            if not self._rung:
                self._rung = True
                self._bell.release()

    def _let_go(self, watched: Watched | None) -> None:
        if watched is None:
            return
        if self._thread is None:
            watched.opened.close()
            return
        with self._lock:
            self._left.append(watched)
        self._ring()

    # ---- the thread's side

    def _run(self, ready: threading.Event, on_failure: Callable[[], None]) -> None:
        try:
            self.priority = raise_priority()
            ready.set()
            wait = 1
            while not self._stopping:
                passed = 0
                if wait > NEAR_TICKS or not self._stare_at_all():
                    if self._bell.acquire(timeout=wait * self.poll_s):
                        self._rung = False
                    passed = wait
                wait = self.tick(passed)
        except BaseException:
            ready.set()
            on_failure()
            raise

    def _stare_at_all(self) -> bool:
        """Look in compiled code until something calls for a ``tick``; False where there is none."""
        if self._stare is None:
            return False
        bell = self._bell_seen_compiled
        bell[0] = 0  # whoever rang before is in the list
        if self._stopping:
            return False
        with self._lock:
            all_ = list(self._watched.values())
        fds = np.array([one.probe.fileno() for one in all_], np.int32)
        every = np.array([one.every for one in all_], np.int64)
        low = np.array([one.quiet_from for one in all_], np.int64)
        high = np.array([one.quiet_below for one in all_], np.int64)
        seen_ns = np.array([int(one.looked_at * 1e9) for one in all_], np.int64)
        left, poll_ns = np.zeros(len(all_), np.uint8), int(self.poll_s * 1e9)
        began, most, changed = self._tick, int(EXTRA_EVERY_S / self.poll_s), False
        while not changed and not left.any() and not bell[0]:
            passed = self._stare(
                fds, every, low, high, seen_ns, left, bell, self._tick, poll_ns, most
            )
            if passed == 0:
                break
            self._tick += passed
            if (now := time.monotonic()) >= self._extra_due:
                with self._lock:
                    changed = self._read_extra(now)
        if self._tick == began:
            return False
        for one, has_left, at in zip(all_, left.tolist(), seen_ns.tolist(), strict=True):
            one.seen(self._tick, at / 1e9)
            if has_left or one.quiet_below == 0:
                one.due = self._tick
        return True

    def _read_extra(self, now: float) -> bool:
        """Once for all, and rarely; returns whether anybody's charge changed by it."""
        self._extra_due = now + EXTRA_EVERY_S
        sharing, changed = self._sharing.pids(), False
        for pid, one in self._watched.items():
            one.slot.beat()
            shm_bytes = torch_shm_bytes(pid) if pid in sharing else 0
            changed |= one.charge_beside(one.slot.pinned_bytes, shm_bytes)
        return changed

    def _look(self, one: Watched, now: float) -> None:
        """Raises ProcessLookupError when it has ended."""
        reading = one.probe.read()
        usage = reading.anon_bytes + one.extra_bytes
        if not one.calm_from <= usage < one.calm_below:
            self._act(one, usage, reading, now)
        one.pace(usage, self._reach_bytes)

    def _act(self, one: Watched, usage_bytes: int, reading: Reading, now: float) -> None:
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

    def _end(self, one: Watched, reading: Reading, now: float) -> None:
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
