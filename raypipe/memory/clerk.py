"""Verdicts: what is said of a process that was ended, and the thread that writes it down.

An fsync takes as long as the disk or the network share likes; the watch must not wait for it.
"""

from __future__ import annotations

import math
import queue
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from raypipe.memory.policy import Limits
from raypipe.memory.registration import Registration
from raypipe.memory.slot import Sentence, Slot
from raypipe.memory.verdict import Verdict
from raypipe.units import format_seconds


def verdict_on(
    registration: Registration,
    slot: Slot,
    sentence: Sentence,
    *,
    told_s: float | None = None,
    unseen_s: float = math.nan,
) -> Verdict:
    """The verdict that a sentence makes; told_s : how long it had been told to take less."""
    limits = Limits.of(registration.budget_bytes)
    return Verdict(
        pid=registration.pid,
        start_ticks=registration.start_ticks,
        host=socket.gethostname(),
        label=registration.label,
        budget_bytes=registration.budget_bytes,
        stop_bytes=limits.hard_bytes,
        usage_bytes=sentence.anon_bytes + sentence.pinned_bytes + sentence.shm_bytes,
        anon_bytes=sentence.anon_bytes,
        pinned_bytes=sentence.pinned_bytes,
        shm_bytes=sentence.shm_bytes,
        file_bytes=sentence.file_bytes,
        batch=slot.batch,
        phase=slot.phase,
        tried=_tried(slot, told_s),
        unseen_s=unseen_s,
        when=sentence.when_ns / 1e9,
    )


class Clerk:
    """Writes verdicts one after the other, on a thread of its own, so that nobody waits for a disk."""

    def __init__(self, on_verdict: Callable[[Verdict], None]) -> None:
        self._on_verdict = on_verdict
        self._orders: queue.Queue[tuple[Verdict, Path | None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="raypipe-verdicts", daemon=True)
        self._thread.start()

    def write(self, verdict: Verdict, folder: Path | None) -> None:
        """Have it written soon. A folder that cannot be written to is said on stderr."""
        self._orders.put((verdict, folder))

    def flush(self) -> None:
        """Wait for all orders so far."""
        self._orders.join()

    def close(self) -> None:
        """Write what is left, then end."""
        self._orders.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (order := self._orders.get()) is not None:
            verdict, folder = order
            try:
                if folder is not None:
                    verdict.write(folder)
            except OSError as error:
                print(
                    f"{folder}: {error.strerror}; this verdict is only here: {verdict.message()}",
                    file=sys.stderr,
                    flush=True,
                )
            self._on_verdict(verdict)
            self._orders.task_done()


def _tried(slot: Slot, told_s: float | None) -> tuple[str, ...]:
    tried = []
    if told_s is None:
        tried.append("what its watch knew is lost with that watch")
    elif told_s > 0:
        tried.append(f"told {format_seconds(told_s)} before to take less")
    if slot.batch and slot.largest_batch and slot.batch < slot.largest_batch:
        tried.append(f"batch {slot.largest_batch} -> {slot.batch}")
    if slot.reliefs:
        tried.append(f"caches emptied {slot.reliefs} time(s)")
    return tuple(tried)
