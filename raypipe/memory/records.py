"""The files by which the ledgers of one machine know of each other, and of who came before them.

A node of Ray has a folder, in shared memory where there is some. In it each process that holds a
lease has a record of it (JSON) and its ``Slot``. Several clusters may run on one machine, each with
a ledger of its own: what the others gave out is read from their records, under one lock.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from raypipe.errors import ResourceError
from raypipe.memory.probe import ProcessProbe
from raypipe.memory.registration import Registration

ABANDONED_S, EMPTY_S = 3600.0, 60.0
_NO_RECORD = (ValueError, KeyError, TypeError)

Holder = tuple[int, int]  # (pid, start_ticks)


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One process's request.

    capacity_bytes : what all who share a limit may hold together; shared_by : who they are
    (``NodeLimits.shared_by``); least_bytes : a smaller lease will do where less is left, down to
    this one, None where it will not; beside_bytes : what a smaller lease leaves free, for those who
    help this process; priority : of two who wait the lower number comes first; holds : it had this
    lease from a predecessor.
    """

    registration: Registration
    capacity_bytes: int
    shared_by: str = ""
    least_bytes: int | None = None
    beside_bytes: int = 0
    priority: int = 0
    holds: bool = False

    @property
    def holder(self) -> Holder:
        """The process, told from a later one of the same number."""
        return self.registration.pid, self.registration.start_ticks


def node_folder(node_id: str) -> Path:
    """The folder of a node's slots and records, made if need be; readable by its user only.

    Raises ResourceError when the name is somebody else's.
    """
    shm = Path("/dev/shm")
    base = shm if shm.is_dir() and os.access(shm, os.W_OK) else Path(tempfile.gettempdir())
    user = os.getuid() if hasattr(os, "getuid") else 0
    # A container that shares /dev/shm with its host has numbers of processes of its own.
    namespace = Path("/proc/self/ns/pid")
    space = namespace.stat().st_ino if namespace.exists() else 0
    folder = base / f"raypipe-memory-{user}-{space}-{node_id}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or (hasattr(os, "getuid") and folder.stat().st_uid != user):
        raise ResourceError(f"{folder} is not yours; have it removed, then run again")
    os.utime(folder)  # in use: nobody clears it now
    return folder


def clear_abandoned_folders(keep: Path) -> None:
    """Remove what ended clusters left beside ``keep``: folders that are empty for a minute, or
    untouched for an hour with nobody in them alive.
    """
    for folder in keep.parent.glob(f"{_kin(keep)}-*/"):
        if folder == keep or folder.is_symlink():
            continue
        with suppress(OSError, ValueError):  # somebody else was quicker, or another name
            files = list(folder.iterdir())
            holders = [tuple(int(part) for part in file.stem.split("-")) for file in files]
            dead = not any(lives((pid, start)) for pid, start in holders)
            age_s = time.time() - folder.stat().st_mtime
            if dead and age_s > (ABANDONED_S if files else EMPTY_S):
                for file in files:
                    file.unlink()
                folder.rmdir()


def slot_path(folder: Path, pid: int, start_ticks: int) -> Path:
    """Where the slot of a process is."""
    return folder / f"{pid}-{start_ticks}.slot"


def record_path(folder: Path, holder: Holder) -> Path:
    """Where the record of a lease is."""
    return folder / f"{holder[0]}-{holder[1]}.json"


def machine_lock(folder: Path) -> FileLock:
    """Held while a lease is granted: no two ledgers of a machine give out the same bytes."""
    return FileLock(folder.with_name(f"{_kin(folder)}.lock"), mode=0o600)


def others_bytes(folder: Path, shared_by: str) -> int:
    """What the ledgers beside the one of ``folder`` have given to processes that live, of those
    who share a limit ("": all share the machine's).
    """
    total = 0
    for path in folder.parent.glob(f"{_kin(folder)}-*/*.json"):
        if path.parent != folder:
            with suppress(OSError, *_NO_RECORD):  # given back in this moment, or not a lease
                ask = _parse(path)
                if shared_by in ("", ask.shared_by) and lives(ask.holder):
                    total += ask.registration.budget_bytes
    return total


def _kin(folder: Path) -> str:
    """What the names of all folders of this user on this machine begin with."""
    return folder.name.rpartition("-")[0]


def lives(holder: Holder) -> bool:
    """Whether that very process is there."""
    try:
        with ProcessProbe(holder[0]) as probe:
            return probe.start_ticks == holder[1]
    except ProcessLookupError:
        return False


def write_record(path: Path, ask: Ask) -> None:
    """Whole or not at all; in memory, so without fsync: it is of no use after a power cut."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(ask), default=str), encoding="utf-8")
    temporary.replace(path)


def read_record(path: Path) -> Ask | None:
    """The request that was granted; None, and said, where the file is no record of one."""
    try:
        return _parse(path)
    except _NO_RECORD as error:
        text = f"{path} is no record of a lease ({error!r}); it is removed, its process unwatched"
        print(text, file=sys.stderr, flush=True)
        return None


def _parse(path: Path) -> Ask:
    values = json.loads(path.read_text(encoding="utf-8"))
    told = values["registration"]
    told["slot_path"] = Path(told["slot_path"])
    told["verdict_dir"] = Path(told["verdict_dir"]) if told["verdict_dir"] else None
    return Ask(**values | {"registration": Registration(**told)})
