"""What every plan of the room has, and the lines that all of them tell."""

from __future__ import annotations

from dataclasses import dataclass

from raypipe.fmri.config import FmriConfig
from raypipe.fmri.inputs import SubjectInputs
from raypipe.fmri.ledger import DONE, Ledger
from raypipe.fmri.plan import Decision
from raypipe.fmri.units import RoiSpec, Unit
from raypipe.units import format_bytes, format_seconds


@dataclass(frozen=True, eq=False, kw_only=True)
class Planned:
    """A run, ready to go. done : units found finished; decision : None when nothing is left.

    cache_bytes, output_bytes : added to the disk, at most; lines : the plan for people
    """

    subjects: tuple[SubjectInputs, ...]
    rois: tuple[RoiSpec, ...]
    done: tuple[Unit, ...]
    decision: Decision | None
    cache_bytes: int
    output_bytes: int
    lines: tuple[str, ...] = ()

    @property
    def failed(self) -> list[tuple[Unit, str]]:
        """Units that cannot be computed, and why."""
        return [one for subject in self.subjects for one in subject.failed]

    @property
    def units(self) -> list[Unit]:
        """Units that are done or can be computed, in the order of subjects, ROIs and targets."""
        return [unit for subject in self.subjects for unit, _ in subject.units]

    @property
    def left(self) -> int:
        """Units still to be computed."""
        return len(self.units) - len(self.done)


def disk_line(cfg: FmriConfig, output_bytes: int, cache_bytes: int) -> str:
    """What the run adds to the disk, and where."""
    where = f" in {cfg.cache_folder()}" if cfg.cache else ": --no-cache"
    return (
        f"disk: results {format_bytes(output_bytes)}, cache {format_bytes(cache_bytes)} to be "
        f"added{where}"
    )


def time_line(cfg: FmriConfig, plan: Planned) -> str:
    """How long the rest will take, by finished units of this run folder; said when there is none."""
    if not plan.left or plan.decision is None:
        return "time: nothing is left to do"
    spent = [
        record["seconds"] + record["seconds_reading"]
        for record in Ledger(cfg.run_dir).all()
        if record.get("status") == DONE and "seconds" in record
    ]
    if not spent:
        return "time: not measured yet, no unit of this run folder is finished"
    seconds = sum(spent) / len(spent) * plan.left / plan.decision.workers
    return f"time: about {format_seconds(seconds)} by {len(spent)} finished units"
