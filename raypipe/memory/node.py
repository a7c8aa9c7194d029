"""One node's memory: its ledger and its watch together, and what a successor needs to take over.

An ordinary class; ``cluster.node_memory`` makes it the actor of its node. Each process that has a
lease has two small files in a folder of the node's own: its ``Slot``, and a record of its lease
(``records``). When this process dies, the next one reads from them who holds what, before it
answers anybody: no lease is given twice, and a verdict that was not written is written then.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from filelock import Timeout

from raypipe.memory.clerk import verdict_on
from raypipe.memory.ledger import Lease, Ledger, Queued, Refused
from raypipe.memory.records import (
    Ask,
    Holder,
    lives,
    machine_lock,
    others_bytes,
    read_record,
    record_path,
    slot_path,
    write_record,
)
from raypipe.memory.registration import Registration
from raypipe.memory.slot import Slot
from raypipe.memory.verdict import Verdict
from raypipe.memory.watch import Watch
from raypipe.units import format_bytes

# The dead among those who still wait for their lease are looked for this often.
SWEEP_S = 0.25
IDLE_SWEEP_S = 2.0
# Who waits asks four times a second.
SILENT_S = 15.0
MACHINE_LOCK_S = 1.0
KEPT_VERDICTS = 256


@dataclass(frozen=True, kw_only=True)
class Answer:
    """state : "granted", "queued" or "refused"; text : why. pid : who answers, to be watched;
    since : when it began, in seconds since 1970; budget_bytes : what is granted, which may be less
    than was asked for (``Ask.least_bytes``).
    """

    state: str
    text: str
    pid: int
    since: float = 0.0
    budget_bytes: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Waiting:
    """That a process waits for its lease: ``seconds`` so far; ``text``: for how much, and who holds it."""

    seconds: float
    text: str


class NodeMemory:
    """Admits processes to the node, watches them, and lets go of those that end.

    folder : see ``node_folder``. on_failure : called when the watching thread fails.
    """

    def __init__(
        self,
        folder: Path,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._folder = folder
        self._admitting, self._lock = threading.Lock(), threading.RLock()
        self._ledger = Ledger(0)  # who asks says what the node can give
        self._machine, self._others_bytes = machine_lock(folder), 0
        self._asks: dict[Holder, Ask] = {}
        self._came_at: dict[Holder, float] = {}
        self._asked_at: dict[Holder, float] = {}
        self._verdicts: dict[int, Verdict] = {}
        self._busy_at, self._since = time.monotonic(), time.time()
        self._closed, self._someone_ended = threading.Event(), threading.Event()
        self._watch = Watch(on_gone=self._gone, on_verdict=self._keep)
        self._restore()
        self._watch.start(on_failure)
        self._notes = [] if _raised(self._watch.priority) else [f"memory: {self._watch.priority}"]
        threading.Thread(target=self._sweep, name="raypipe-memory-sweep", daemon=True).start()

    def admit(self, ask: Ask) -> Answer:
        """Ask, or ask again: a granted process is watched from the moment of its grant.

        The machine's lock comes before our own, and not for long: whoever holds it may be stopped,
        and what the watch and the other callers need must stay free meanwhile.
        """
        with self._admitting:
            try:
                self._machine.acquire(timeout=MACHINE_LOCK_S, poll_interval=0.002)
            except Timeout:
                text = f"another ledger of this machine holds {self._machine.lock_file}"
                return self._answer("queued", text)
            try:
                with self._lock:
                    return self._admit(ask)
            finally:
                self._machine.release()

    def _admit(self, ask: Ask) -> Answer:
        self._busy_at = self._asked_at[ask.holder] = time.monotonic()
        self._came_at.setdefault(ask.holder, self._busy_at)
        self._others_bytes = others_bytes(self._folder, ask.shared_by)
        self._set_capacity(ask.capacity_bytes)
        if ask.holds:
            self._ledger.restore([_lease(ask)])
        held = next((lease for lease in self._ledger.leases if lease.key == ask.holder), None)
        if held is not None and ask.least_bytes is not None:  # it may not have heard how much
            ask = _with_budget(ask, held.n_bytes)
        elif ask.least_bytes is not None:
            left = self._ledger.free_bytes - ask.beside_bytes
            if ask.least_bytes <= left < ask.registration.budget_bytes and not self._ledger.queue:
                ask = _with_budget(ask, left)
        found = self._ledger.request(
            ask.holder,
            ask.holder,
            ask.registration.budget_bytes,
            ask.priority,
            refuse_above=ask.capacity_bytes,
        )
        if isinstance(found, Refused):
            return self._answer("refused", found.text)
        free = self._ledger.free_bytes - ask.beside_bytes
        if found == Queued(0) and ask.least_bytes is not None and ask.least_bytes <= free:
            ask, found = _with_budget(ask, free), self._ledger.take_less(ask.holder, free)
        before = self._asks.get(ask.holder)
        self._asks[ask.holder] = ask
        if isinstance(found, Queued):
            if before is None:
                self._someone_ended.set()  # from now on the sweep looks more often
            return self._answer("queued", self._why_waiting(ask))
        if before is None or before != ask or not self._is_watched(ask):
            self._take_in(ask)
        return self._answer("granted", "", ask.registration.budget_bytes)

    def leave(self, holder: Holder) -> None:
        """That process needs its lease, or its place in the queue, no more."""
        with self._lock:
            self._busy_at = time.monotonic()
            self._watch.unregister(holder[0])
            self._forget(holder)

    def verdict_of(self, pid: int) -> Verdict | None:
        """The last verdict on a process of that number, written or not; waits for the writing."""
        self._watch.flush()
        return self._verdicts.get(pid)

    def why_waiting(self, label: str) -> Waiting | None:
        """What the process called ``label`` waits for, and who holds it; None when it does not wait."""
        with self._lock:
            waiting = {lease.holder for lease in self._ledger.queue}
            for holder, ask in self._asks.items():
                if holder in waiting and ask.registration.label == label:
                    seconds = time.monotonic() - self._came_at[holder]
                    return Waiting(seconds, self._why_waiting(ask))
        return None

    def state(self) -> dict[str, Any]:
        """Who holds and who waits, as JSON types: for ``doctor`` and for tests."""
        with self._lock:
            return {
                "pid": os.getpid(),
                "priority": self._watch.priority,
                "looks": self._watch.looks,
                "watch_thread": self._watch.thread_id,
                "capacity_bytes": self._ledger.capacity_bytes,
                "free_bytes": self._ledger.free_bytes,
                "leases": {str(self._pid(lease)): lease.n_bytes for lease in self._ledger.leases},
                "queue": {str(self._pid(lease)): lease.n_bytes for lease in self._ledger.queue},
                "watched": [one.pid for one in self._watch.registrations],
            }

    def idle_s(self) -> float:
        """Seconds since somebody held or wanted something; 0 while somebody does."""
        with self._lock:
            return 0.0 if self._asks else time.monotonic() - self._busy_at

    def close(self) -> None:
        """Stop watching; the folder goes when nobody is in it."""
        self._closed.set()
        self._someone_ended.set()
        self._watch.stop()
        with suppress(OSError):  # somebody is in it, or it is gone
            self._folder.rmdir()

    # ---- its own side

    def _set_capacity(self, capacity_bytes: int) -> None:
        """The smallest that a holder, or who asks now, was told of, as runs may keep different
        buffers free; less what other ledgers of the machine have given out.
        """
        holders = {lease.holder for lease in self._ledger.leases}
        stated = [ask.capacity_bytes for holder, ask in self._asks.items() if holder in holders]
        smallest = min([*stated, capacity_bytes]) - self._others_bytes
        if smallest != self._ledger.capacity_bytes:
            self._ledger.limit_to(smallest)

    def _take_in(self, ask: Ask) -> None:
        """Watch it and write its record. Its end in this very moment is seen by its next sweep."""
        try:
            self._watch.register(ask.registration)
        except ProcessLookupError:
            self._forget(ask.holder)
            return
        except Exception:
            self._forget(ask.holder)  # no lease for what nobody watches
            raise
        write_record(record_path(self._folder, ask.holder), ask)

    def _gone(self, registration: Registration) -> None:
        """On the watch's thread, which waits for nobody: the sweep does the rest."""
        self._someone_ended.set()

    def _forget(self, holder: Holder) -> None:
        self._drop(holder)
        for path in (record_path(self._folder, holder), slot_path(self._folder, *holder)):
            path.unlink(missing_ok=True)

    def _drop(self, holder: Holder) -> None:
        self._asks.pop(holder, None)
        self._asked_at.pop(holder, None)
        self._came_at.pop(holder, None)
        self._ledger.holder_died(holder)

    def _keep(self, verdict: Verdict) -> None:
        self._verdicts.pop(verdict.pid, None)
        self._verdicts[verdict.pid] = verdict
        while len(self._verdicts) > KEPT_VERDICTS:
            del self._verdicts[next(iter(self._verdicts))]

    def _sweep(self) -> None:
        """Let go of those that ended; and of those that wait and have stopped asking, as a stopped
        process does: it would keep all behind it waiting.
        """
        while not self._closed.is_set():
            self._someone_ended.wait(SWEEP_S if self._ledger.queue else IDLE_SWEEP_S)
            self._someone_ended.clear()
            with self._lock:
                watched = {(one.pid, one.start_ticks) for one in self._watch.registrations}
                for holder in self._asks.keys() - watched:
                    if not lives(holder):
                        self._busy_at = time.monotonic()
                        self._forget(holder)
                waiting = {lease.holder for lease in self._ledger.queue}
                for holder in [one for one in self._asks if one in waiting]:
                    if time.monotonic() > self._asked_at.get(holder, 0.0) + SILENT_S:
                        self._drop(holder)

    def _restore(self) -> None:
        """Take over from a predecessor: those who live keep their leases, the dead are judged."""
        for path in self._folder.glob("*.json"):
            ask = read_record(path)
            if ask is None:
                path.unlink(missing_ok=True)
            elif lives(ask.holder):
                self._asks[ask.holder] = ask
                self._set_capacity(ask.capacity_bytes)
                self._ledger.restore([_lease(ask)])
                try:
                    self._take_in(ask)
                except OSError as error:  # its slot is gone: it keeps its own budget
                    print(
                        f"{ask.registration.label}: {error}; unwatched", file=sys.stderr, flush=True
                    )
            else:
                self._judge(ask)
                self._forget(ask.holder)

    def _judge(self, ask: Ask) -> None:
        """A predecessor may have killed it and died before it had written why."""
        try:
            slot = Slot(ask.registration.slot_path)
        except FileNotFoundError:
            return
        if slot.sentence is not None:
            verdict = verdict_on(ask.registration, slot, slot.sentence)
            self._watch.write(verdict, ask.registration.verdict_dir)
        slot.close()

    def _is_watched(self, ask: Ask) -> bool:
        return ask.registration in self._watch.registrations

    def _why_waiting(self, ask: Ask) -> str:
        free, capacity = self._ledger.free_bytes, self._ledger.capacity_bytes
        text = (
            f"{format_bytes(ask.registration.budget_bytes)} are asked for, "
            f"{format_bytes(max(0, free))} of {format_bytes(max(0, capacity))} are free"
        )
        if before := self._named(self._ledger.queue, until=ask.holder):
            text += f"; before it {'comes' if len(before) == 1 else 'come'} {', '.join(before)}"
        text += f"; held by {', '.join(self._named(self._ledger.leases)) or 'nobody'}"
        if self._others_bytes:
            others = format_bytes(self._others_bytes)
            text += f" here, {others} by other nodes or clusters on this machine"
        return text

    def _named(self, leases: Sequence[Lease], until: Holder | None = None) -> list[str]:
        """``NAME (PID) SIZE of RUN`` of each, up to the one of ``until``."""
        first = itertools.takewhile(lambda lease: lease.holder != until, leases)
        return [self._words(lease) for lease in first]

    def _words(self, lease: Lease) -> str:
        ask, size = self._asks.get(cast("Holder", lease.holder)), format_bytes(lease.n_bytes)
        if ask is None:
            return f"{lease.holder} {size}"
        told = ask.registration
        run = f" of {told.verdict_dir.parent}" if told.verdict_dir else ""  # its folder
        return f"{told.label} ({told.pid}) {size}{run}"

    def _answer(self, state: str, text: str, budget_bytes: int = 0) -> Answer:
        notes, self._notes = tuple(self._notes), []
        return Answer(
            state=state,
            text=text,
            pid=os.getpid(),
            since=self._since,
            budget_bytes=budget_bytes,
            notes=notes,
        )

    @staticmethod
    def _pid(lease: Lease) -> Any:
        return lease.holder[0] if isinstance(lease.holder, tuple) else lease.holder


def _with_budget(ask: Ask, n_bytes: int) -> Ask:
    return replace(ask, registration=replace(ask.registration, budget_bytes=n_bytes))


def _lease(ask: Ask) -> Lease:
    return Lease(
        key=ask.holder,
        holder=ask.holder,
        n_bytes=ask.registration.budget_bytes,
        priority=ask.priority,
    )


def _raised(priority: str) -> bool:
    return not priority.startswith("ordinary")
