"""One node's memory: its ledger and its watch together, and what a successor needs to take over.

An ordinary class; ``cluster.node_memory`` makes it the actor of its node. Each process that has a
lease has two small files in a folder of the node's own: its ``Slot``, and a record of its lease.
When this process dies, the next one reads from them who holds what, before it answers anybody: no
lease is given twice, and a verdict that was not written is written then.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raypipe.errors import ResourceError
from raypipe.memory.ledger import Lease, Ledger, Queued, Refused
from raypipe.memory.probe import ProcessProbe
from raypipe.memory.slot import Slot
from raypipe.memory.verdict import Verdict
from raypipe.memory.watch import Registration, Watch, verdict_on
from raypipe.units import format_bytes

# The dead among those who still wait for their lease are looked for this often.
SWEEP_S = 0.25
KEPT_VERDICTS = 256
ABANDONED_S, EMPTY_S = 3600.0, 60.0

Holder = tuple[int, int]  # (pid, start_ticks)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One process's request. holds : it had this lease from a predecessor of the one it asks."""

    registration: Registration
    capacity_bytes: int
    priority: int = 0
    holds: bool = False

    @property
    def holder(self) -> Holder:
        """The process, told from a later one of the same number."""
        return self.registration.pid, self.registration.start_ticks


@dataclass(frozen=True, kw_only=True)
class Answer:
    """state : "granted", "queued" or "refused"; text : why. pid : who answers, to be watched."""

    state: str
    text: str
    pid: int
    notes: tuple[str, ...] = ()


def node_folder(node_id: str) -> Path:
    """The folder of a node's slots and records, made if need be; readable by its user only.

    Raises ResourceError when the name is somebody else's.
    """
    shm = Path("/dev/shm")
    base = shm if shm.is_dir() and os.access(shm, os.W_OK) else Path(tempfile.gettempdir())
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = base / f"raypipe-memory-{user}-{node_id}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or (hasattr(os, "getuid") and folder.stat().st_uid != user):
        raise ResourceError(f"{folder} is not yours; have it removed, then run again")
    os.utime(folder)  # in use: nobody clears it now
    return folder


def clear_abandoned_folders(keep: Path) -> None:
    """Remove what ended clusters left beside ``keep``: folders that are empty for a minute, or
    untouched for an hour with nobody in them alive.
    """
    for folder in keep.parent.glob(f"{keep.name.rpartition('-')[0]}-*"):
        if folder == keep or folder.is_symlink():
            continue
        with suppress(OSError, ValueError):  # somebody else was quicker, or another name
            files = list(folder.iterdir())
            holders = [tuple(int(part) for part in file.stem.split("-")) for file in files]
            dead = not any(_lives((pid, start)) for pid, start in holders)
            age_s = time.time() - folder.stat().st_mtime
            if dead and age_s > (ABANDONED_S if files else EMPTY_S):
                for file in files:
                    file.unlink()
                folder.rmdir()


def slot_path(folder: Path, pid: int, start_ticks: int) -> Path:
    """Where the slot of a process is."""
    return folder / f"{pid}-{start_ticks}.slot"


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
        self._lock = threading.RLock()
        self._ledger = Ledger(0)  # who asks says what the node can give
        self._asks: dict[Holder, Ask] = {}
        self._verdicts: dict[int, Verdict] = {}
        self._busy_at = time.monotonic()
        self._closed = threading.Event()
        self._watch = Watch(on_gone=self._gone, on_verdict=self._keep)
        self._restore()
        self._watch.start(on_failure)
        self._notes = [] if _raised(self._watch.priority) else [f"memory: {self._watch.priority}"]
        threading.Thread(target=self._sweep, name="raypipe-memory-sweep", daemon=True).start()

    def admit(self, ask: Ask) -> Answer:
        """Ask, or ask again: a granted process is watched from the moment of its grant."""
        with self._lock:
            self._busy_at = time.monotonic()
            self._set_capacity(ask.capacity_bytes)
            if ask.holds:
                self._ledger.restore([_lease(ask)])
            found = self._ledger.request(
                ask.holder,
                ask.holder,
                ask.registration.budget_bytes,
                ask.priority,
                refuse_above=ask.capacity_bytes,
            )
            if isinstance(found, Refused):
                return self._answer("refused", found.text)
            before = self._asks.get(ask.holder)
            self._asks[ask.holder] = ask
            if isinstance(found, Queued):
                return self._answer("queued", self._why_waiting(ask, found.position))
            if before is None or before != ask or not self._is_watched(ask):
                self._take_in(ask)
            return self._answer("granted", "")

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

    def state(self) -> dict[str, Any]:
        """Who holds and who waits, as JSON types: for ``doctor`` and for tests."""
        with self._lock:
            return {
                "pid": os.getpid(),
                "priority": self._watch.priority,
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
        self._watch.stop()
        with suppress(OSError):  # somebody is in it, or it is gone
            self._folder.rmdir()

    # ---- its own side

    def _set_capacity(self, capacity_bytes: int) -> None:
        """The smallest that a holder, or who asks now, was told of: runs may keep different buffers
        free.
        """
        holders = {lease.holder for lease in self._ledger.leases}
        stated = [ask.capacity_bytes for holder, ask in self._asks.items() if holder in holders]
        smallest = min([*stated, capacity_bytes])
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
        _write_record(self._record(ask.holder), ask)

    def _gone(self, registration: Registration) -> None:
        with self._lock:
            self._busy_at = time.monotonic()
            self._forget((registration.pid, registration.start_ticks))

    def _forget(self, holder: Holder) -> None:
        self._asks.pop(holder, None)
        self._ledger.holder_died(holder)
        for path in (self._record(holder), slot_path(self._folder, *holder)):
            path.unlink(missing_ok=True)

    def _keep(self, verdict: Verdict) -> None:
        self._verdicts.pop(verdict.pid, None)
        self._verdicts[verdict.pid] = verdict
        while len(self._verdicts) > KEPT_VERDICTS:
            del self._verdicts[next(iter(self._verdicts))]

    def _sweep(self) -> None:
        """Find the dead among those that wait: the watch has only those that were granted."""
        while not self._closed.wait(SWEEP_S):
            with self._lock:
                watched = {(one.pid, one.start_ticks) for one in self._watch.registrations}
                for holder in self._asks.keys() - watched:
                    if not _lives(holder):
                        self._forget(holder)

    def _restore(self) -> None:
        """Take over from a predecessor: those who live keep their leases, the dead are judged."""
        for path in self._folder.glob("*.json"):
            ask = _read_record(path)
            if ask is None:
                path.unlink(missing_ok=True)
            elif _lives(ask.holder):
                self._asks[ask.holder] = ask
                self._set_capacity(ask.capacity_bytes)
                self._ledger.restore([_lease(ask)])
                try:
                    self._take_in(ask)
                except (
                    OSError
                ) as error:  # its slot was cleared away: it keeps itself, see its guard
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

    def _why_waiting(self, ask: Ask, position: int) -> str:
        held = ", ".join(
            f"{self._label(lease)} {format_bytes(lease.n_bytes)}" for lease in self._ledger.leases
        )
        return (
            f"{format_bytes(ask.registration.budget_bytes)} are asked for, "
            f"{format_bytes(max(0, self._ledger.free_bytes))} of "
            f"{format_bytes(self._ledger.capacity_bytes)} are free, {position} before it; "
            f"held by {held or 'nobody'}"
        )

    def _label(self, lease: Lease) -> str:
        for holder, ask in self._asks.items():
            if holder == lease.holder:
                return f"{ask.registration.label} ({holder[0]})"
        return str(lease.holder)

    def _answer(self, state: str, text: str) -> Answer:
        notes, self._notes = tuple(self._notes), []
        return Answer(state=state, text=text, pid=os.getpid(), notes=notes)

    def _record(self, holder: Holder) -> Path:
        return self._folder / f"{holder[0]}-{holder[1]}.json"

    @staticmethod
    def _pid(lease: Lease) -> Any:
        return lease.holder[0] if isinstance(lease.holder, tuple) else lease.holder


def _lease(ask: Ask) -> Lease:
    return Lease(
        key=ask.holder,
        holder=ask.holder,
        n_bytes=ask.registration.budget_bytes,
        priority=ask.priority,
    )


def _lives(holder: Holder) -> bool:
    try:
        with ProcessProbe(holder[0]) as probe:
            return probe.start_ticks == holder[1]
    except ProcessLookupError:
        return False


def _raised(priority: str) -> bool:
    return not priority.startswith("ordinary")


def _write_record(path: Path, ask: Ask) -> None:
    """Whole or not at all; in memory, so without fsync: it is of no use after a power cut."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(ask), default=str), encoding="utf-8")
    temporary.replace(path)


def _read_record(path: Path) -> Ask | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        told = values["registration"]
        told["slot_path"] = Path(told["slot_path"])
        told["verdict_dir"] = Path(told["verdict_dir"]) if told["verdict_dir"] else None
        return Ask(**values | {"registration": Registration(**told)})
    except (ValueError, KeyError, TypeError) as error:
        text = f"{path} is no record of a lease ({error!r}); it is removed, its process unwatched"
        print(text, file=sys.stderr, flush=True)
        return None
