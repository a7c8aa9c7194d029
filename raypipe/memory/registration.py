"""Who is watched: what a process says of itself when it asks for its lease."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Registration:
    """A process under watch. start_ticks : field 22 of its stat; with pid, it is that process.

    slot_path : its ``Slot``. verdict_dir : where a verdict on it is written; None writes none.
    """

    pid: int
    start_ticks: int
    budget_bytes: int
    label: str
    slot_path: Path
    verdict_dir: Path | None = None
