"""What of a run is done: one durable record a unit, which a crash at any moment leaves whole or absent.

``units/<unit_id>.json`` stands for a unit's results. It is written last and, when a unit is computed
anew with other inputs or options, removed first: so wherever it stands, the files that it names are of
its key. A unit is done when its record has the same key and says so; failed ones are tried again.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from raypipe.fmri.units import Unit
from raypipe.store.durable import fsync_dir, make_dirs, remove
from raypipe.store.space import explain_os_errors

FOLDER = "units"
DONE, FAILED = "done", "failed"


@dataclass(frozen=True)
class Ledger:
    """The records of the run in ``run_dir``."""

    run_dir: Path

    def path(self, unit: Unit) -> Path:
        """Its record."""
        return self.run_dir / FOLDER / f"{unit.unit_id}.json"

    def read(self, unit: Unit) -> dict[str, Any] | None:
        """Its record, of whatever key; None where there is none that can be read."""
        return _read(self.path(unit))

    def is_done(self, unit: Unit) -> bool:
        """Whether its results are there, of the same inputs and options."""
        record = self.read(unit)
        if record is None or record.get("key") != unit.key or record.get("status") != DONE:
            return False
        return all(_size(self.run_dir / name) == n for name, n in record["files"].items())

    def begin(self, unit: Unit) -> None:
        """Before its files are written: whatever record there is ends here."""
        make_dirs(self.run_dir / FOLDER)
        remove([self.path(unit)])

    def finish(self, unit: Unit, fields: Mapping[str, Any], files: Sequence[Path]) -> None:
        """Its files are on the disk: record it as done. Nothing of it is lost from here on."""
        sizes = {str(path.relative_to(self.run_dir)): path.stat().st_size for path in files}
        self._record(unit, {"status": DONE, "reason": None, **fields, "files": sizes})

    def fail(self, unit: Unit, reason: str) -> None:
        """Record why it could not be done."""
        self.begin(unit)
        self._record(unit, {"status": FAILED, "reason": reason, "files": {}})

    def all(self) -> list[dict[str, Any]]:
        """Every record that can be read, by name."""
        found = (_read(path) for path in sorted((self.run_dir / FOLDER).glob("*.json")))
        return [record for record in found if record is not None]

    def sweep(self) -> None:
        """Remove what killed writers left behind; to be called while nobody writes."""
        for folder in (FOLDER, "series"):
            remove((self.run_dir / folder).glob(".*.tmp"))

    def _record(self, unit: Unit, fields: Mapping[str, Any]) -> None:
        head = {
            "unit": unit.unit_id,
            "key": unit.key,
            "subject": unit.subject,
            "roi": unit.roi,
            "target": unit.target,
        }
        text = json.dumps({**head, **fields}, indent=1, allow_nan=False) + "\n"
        write_whole(self.path(unit), lambda file: file.write(text.encode()))


def write_whole(path: Path, write: Callable[[BinaryIO], Any], *, need_bytes: int = 0) -> Path:
    """Have ``write`` fill a file that gets its name when all of it is on the disk.

    The temporary name is this writer's own: a worker that was given up may still be writing the same.
    Raises NoSpace on a full disk.
    """
    with explain_os_errors(path, need_bytes):
        make_dirs(path.parent)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        fsync_dir(path.parent)
    return path


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    whole = isinstance(record, dict) and isinstance(record.get("files"), dict)
    return record if whole else None


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
