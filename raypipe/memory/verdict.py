"""Why a process was ended: written by who ended it, read by whoever misses the process.

A verdict is one small JSON file, verdict-PID-START.json, which appears whole or not at all.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from raypipe.errors import StoreCorrupt
from raypipe.units import format_bytes

_PATTERN = "verdict-*.json"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was held, in bytes, of which budget, and what was tried before.

    start_ticks : with pid, tells a process from a later one of the same number
    stop_bytes  : the hard limit that ``usage_bytes`` reached; usage = anon + pinned + shm
    unseen_s    : seconds between the look before and this one
    batch       : items computed at once when it ended, as it said; when : seconds since 1970
    """

    pid: int
    start_ticks: int
    host: str
    label: str
    budget_bytes: int
    stop_bytes: int
    usage_bytes: int
    anon_bytes: int
    pinned_bytes: int
    shm_bytes: int
    file_bytes: int
    batch: int | None
    phase: str
    tried: tuple[str, ...]
    unseen_s: float
    when: float

    @property
    def name(self) -> str:
        """Its file's name."""
        return _name(self.pid, self.start_ticks)

    def message(self) -> str:
        """One line for a person: budget, usage, what it was made of, what was tried, what to do."""
        doing = f" in {self.phase}" if self.phase else ""
        batch = f" at batch {self.batch}" if self.batch else ""
        smaller = "a smaller batch, " if self.batch != 1 else ""
        return (
            f"{self.label} (process {self.pid} on {self.host}) was stopped{doing}{batch}: it held "
            f"{format_bytes(self.usage_bytes)} of its budget of {format_bytes(self.budget_bytes)} "
            f"and is stopped from {format_bytes(self.stop_bytes)} on "
            f"(anonymous {format_bytes(self.anon_bytes)}, pinned {format_bytes(self.pinned_bytes)},"
            f" shared tensors {format_bytes(self.shm_bytes)}; "
            f"{format_bytes(self.file_bytes)} of file pages not counted); "
            f"tried: {', '.join(self.tried) or 'nothing, it came within one look'}; "
            f"give {smaller}a larger --max-memory-per-process, or fewer --workers"
        )

    def write(self, folder: Path) -> Path:
        """Write it durably: after a power cut it is there as a whole, or not. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.name
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("wb") as file:
            file.write(json.dumps(asdict(self), indent=1).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        return path

    @classmethod
    def read(cls, path: Path) -> Verdict:
        """The verdict at ``path``. Raises FileNotFoundError; StoreCorrupt for anything else."""
        try:
            values = json.loads(path.read_bytes())
            known = {field.name: values[field.name] for field in fields(cls)}
            return cls(**known | {"tried": tuple(known["tried"])})
        except (ValueError, KeyError, TypeError) as error:
            raise StoreCorrupt(
                f"{path} is no verdict on a process ({type(error).__name__}: {error}); remove it"
            ) from error


def find(folder: Path, pid: int, start_ticks: int) -> Verdict | None:
    """The verdict on that process, if there is one."""
    try:
        return Verdict.read(folder / _name(pid, start_ticks))
    except FileNotFoundError:
        return None


def read_all(folder: Path) -> list[Verdict]:
    """All verdicts in ``folder``, oldest first."""
    found = [Verdict.read(path) for path in folder.glob(_PATTERN)]
    return sorted(found, key=lambda verdict: verdict.when)


def _name(pid: int, start_ticks: int) -> str:
    return f"verdict-{pid}-{start_ticks}.json"
