"""The worker of models: one unit at a time, in blocks of voxels, its files and then its record.

An ordinary class (``runner.StepWorker``). What cannot be used ends its own unit with a reason; only
memory and the disk end the run.
"""

from __future__ import annotations

import os
import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from raypipe.errors import InputError, MemoryBudgetExceeded, ResourceError
from raypipe.fmri.glm.estimate import OpenRun, conditions_of, open_runs, trials_of
from raypipe.fmri.glm.items import BetaItem
from raypipe.fmri.glm.job import BetasConfig
from raypipe.fmri.glm.outputs import save_contrasts, save_trials
from raypipe.fmri.ledger import Ledger
from raypipe.fmri.masks import Grid
from raypipe.fmri.peak import Peak
from raypipe.fmri.results import source_of
from raypipe.fmri.series import Subject
from raypipe.fmri.units import RoiSpec
from raypipe.fmri.work import Notes, Outcome, failed
from raypipe.memory.guard import current, note, relieve
from raypipe.runner import Done


@dataclass(frozen=True, kw_only=True)
class BetaShared:
    """What all workers of a run share."""

    cfg: BetasConfig
    rois: tuple[RoiSpec, ...]
    use_memmap: bool


class BetaWorker:
    """Fits units, with one BLAS thread; see the module."""

    def __init__(self) -> None:
        self._blas = threadpool_limits(1)
        self._id = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._shared: BetaShared | None = None

    def describe(self) -> str:
        """Which process this is."""
        return self._id

    def open(self, shared: BetaShared) -> str:
        """Take the run's options. Raises InputError when this machine does not see its folder."""
        if not shared.cfg.run_dir.is_dir():
            raise InputError(
                f"{os.uname().nodename} does not see {shared.cfg.run_dir}; put --run-dir on a disk that "
                "every machine mounts"
            )
        self._shared = shared
        return self._id

    def step(self, item: BetaItem, upcoming: BetaItem | None) -> list[Done]:
        """Fit the unit unless it is done."""
        return [Done(item.key, self._outcome(item))]

    def drain(self) -> list[Done]:
        """Nothing is held back."""
        return []

    def close(self) -> None:
        """Give BLAS its threads back."""
        self._blas.restore_original_limits()

    @property
    def _job(self) -> BetaShared:
        if self._shared is None:
            raise RuntimeError("a worker is opened before its first step")
        return self._shared

    def _outcome(self, item: BetaItem) -> Outcome:
        ledger, notes = Ledger(self._job.cfg.run_dir), Notes()
        if ledger.is_done(item.unit):  # by a worker that died
            return Outcome(unit=item.unit, found=True)
        try:
            self._fit(self._within_memory(item), ledger, notes)
        except (MemoryError, ResourceError):
            raise
        except Exception as error:  # the unit's record says what it was
            return failed(item.unit, error, ledger, notes)
        return Outcome(unit=item.unit, warnings=tuple(notes.warnings))

    def _within_memory(self, item: BetaItem) -> BetaItem:
        """Under pressure, smaller blocks; as small as they get, whatever there is has to do."""
        if not current().pressure():
            return item
        relieve()
        try:
            return item.with_less_memory()
        except MemoryBudgetExceeded:
            return item

    def _fit(self, item: BetaItem, ledger: Ledger, notes: Notes) -> None:
        while True:
            try:
                self._fit_once(item, ledger, notes)
                return
            except MemoryError:
                relieve()
                item = item.with_less_memory()

    def _fit_once(self, item: BetaItem, ledger: Ledger, notes: Notes) -> None:
        job, cfg, unit = self._job, self._job.cfg, item.unit
        note(step=0, batch=item.budget_bytes >> 20, phase=unit.unit_id)
        with Peak() as peak, notes.listening(), ExitStack() as opened:
            started = time.monotonic()
            subject = Subject.open(cfg, item.runs, job.rois)
            runs = open_runs(
                cfg, subject, unit.roi, use_memmap=job.use_memmap, say=notes.reading.append
            )
            for run in runs:
                if run.store is not None:
                    opened.enter_context(run.store)
            ready = time.monotonic()
            ledger.begin(unit)
            files, told = self._results(item, subject, runs)
        spec = next(spec for spec in job.rois if spec.name == unit.roi)
        fields = told | {
            "runs": [
                source_of(cfg, scan, run, spec)
                for scan, run in zip(subject.scans, subject.runs, strict=True)
            ],
            "method": cfg.method,
            "scores": {},
            "outside_mask": sum(found.outside[unit.roi] for found in subject.regions),
            "scrubbed": sum(_scrubbed(run) for run in runs),
            "ways": [run.way for run in runs],
            "seconds": time.monotonic() - ready,
            "seconds_reading": ready - started,
            "peak_anon_bytes": peak.bytes,
            "reading": notes.reading,
            "warnings": notes.warnings,
        }
        ledger.finish(unit, fields, files)

    def _results(
        self, item: BetaItem, subject: Subject, runs: list[OpenRun]
    ) -> tuple[list[Path], dict[str, Any]]:
        cfg, grid = self._job.cfg, Grid.of(subject.scans[0])
        if cfg.method == "conditions":
            found = conditions_of(cfg, item, subject, runs)
            files = save_contrasts(cfg, item.unit, item.runs[0], grid, found)
            flags = (found.not_finite, found.constant)
            return files, {"contrasts": list(found.maps), **_counts(len(found.voxels), *flags)}
        trials = trials_of(cfg, item, subject, runs[0])
        files, row = save_trials(
            cfg, item.unit, item.runs[0], item.first, grid, trials, runs[0].events
        )
        kinds, counts = np.unique(trials.labels, return_counts=True)
        told = {"n_trials": len(trials.labels), "table": row}
        told |= {"trials": dict(zip(kinds.tolist(), counts.tolist(), strict=True))}
        return files, told | _counts(len(trials.voxels), trials.not_finite, trials.constant)


def _counts(n_voxels: int, not_finite: np.ndarray, constant: np.ndarray) -> dict[str, int]:
    return {
        "n_voxels": n_voxels,
        "not_finite": int(not_finite.sum()),
        "constant": int(constant.sum()),
    }


def _scrubbed(run: OpenRun) -> int:
    return 0 if run.kept is None else run.source.n_volumes - len(run.kept)
