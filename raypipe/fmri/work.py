"""The worker of fMRI runs: reads and cleans the regions of a subject, decodes or writes them, records.

An ordinary class (``runner.StepWorker``). A unit's record is on the disk before it is reported, so a
worker that dies loses the unit under way and no other: whoever gets its item next finds the rest done.
What cannot be used ends its own units with a reason; only memory and the disk end the run.
"""

from __future__ import annotations

import os
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from threadpoolctl import threadpool_limits

from raypipe.errors import (
    InputError,
    MemoryBudgetExceeded,
    RaypipeError,
    RaypipeWarning,
    ResourceError,
)
from raypipe.fmri.config import FmriConfig, MvpaJobConfig, RoiConfig
from raypipe.fmri.inputs import one_line
from raypipe.fmri.ledger import Ledger
from raypipe.fmri.peak import Peak
from raypipe.fmri.plan import LESS, Batch
from raypipe.fmri.results import mvpa_fields, roi_fields, save_decoding, save_series
from raypipe.fmri.samples import design_of
from raypipe.fmri.series import Joined, Subject, joined, run_series
from raypipe.fmri.units import RoiSpec, Unit
from raypipe.fmri.weight_files import save_weights
from raypipe.memory.guard import current, note, relieve
from raypipe.memory.policy import Throttle
from raypipe.read.runfiles import RunFiles
from raypipe.runner import Done

_OF_CODE = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning)
_LIBRARY_CHARS = 160


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What all workers of a run share."""

    cfg: FmriConfig
    rois: tuple[RoiSpec, ...]
    use_memmap: bool


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """Call it to make a worker. threads : for cleaning; BLAS has one, so numbers do not depend on it."""

    threads: int = 1

    def __call__(self) -> FmriWorker:
        return FmriWorker(self)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a unit. reason, exit_code : of a failed one; found : it was done before."""

    unit: Unit
    reason: str | None = None
    exit_code: int = 0
    found: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Notes:
    """What is said while a group of regions is worked on: warnings, and from where scans were read."""

    warnings: list[str] = field(default_factory=list)
    reading: list[str] = field(default_factory=list)
    _places: set[tuple[str, str, int]] = field(default_factory=set)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, warnings are noted, each once, instead of printed.

        Ours in full; a library's, such as that a fit did not converge, by kind and first words, once a
        line of its code (some tell a number that is another in each fold). Those about code are not for
        who reads results.
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for kind in _OF_CODE:
                warnings.simplefilter("ignore", kind)
            warnings.simplefilter("always", RaypipeWarning)
            yield
        for one in caught:
            text = " ".join(str(one.message).split())
            if not issubclass(one.category, RaypipeWarning):
                place = (one.category.__name__, one.filename, one.lineno)
                if place in self._places:
                    continue
                self._places.add(place)
                text = f"{one.category.__name__}: {text[:_LIBRARY_CHARS]}"
            if text not in self.warnings:
                self.warnings.append(text)


class FmriWorker:
    """Computes batches of units; see the module."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._threads = setup.threads
        self._blas = threadpool_limits(1)
        self._id = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._shared: Shared | None = None
        self._opened: tuple[tuple[RunFiles, ...], Subject] | None = None

    def describe(self) -> str:
        """Which process this is."""
        return self._id

    def open(self, shared: Shared) -> str:
        """Take the run's options. Raises InputError when this machine does not see its folder."""
        if not shared.cfg.run_dir.is_dir():
            raise InputError(
                f"{os.uname().nodename} does not see {shared.cfg.run_dir}; put --run-dir on a disk that "
                "every machine mounts"
            )
        self._shared, self._opened = shared, None
        return self._id

    def step(self, item: Batch, upcoming: Batch | None) -> list[Done]:
        """Compute the units of ``item`` that are not done; each is recorded as it is finished."""
        return [Done(item.key, tuple(self._outcomes(item)))]

    def drain(self) -> list[Done]:
        """Nothing is held back."""
        return []

    def close(self) -> None:
        """Give BLAS its threads back."""
        self._blas.restore_original_limits()

    @property
    def _job(self) -> Shared:
        if self._shared is None:
            raise RuntimeError("a worker is opened before its first step")
        return self._shared

    def _outcomes(self, item: Batch) -> Iterator[Outcome]:
        ledger = Ledger(self._job.cfg.run_dir)
        found = [unit for unit in item.units if ledger.is_done(unit)]  # by a worker that died
        yield from (Outcome(unit=unit, found=True) for unit in found)
        left = [unit for unit in item.units if unit not in found]
        throttle = Throttle(item.at_once)
        while left:
            if pressed := current().pressure():
                relieve()
            n = throttle.next(pressed)
            note(step=item.number, batch=n, phase=f"reading sub-{item.subject}")
            rois = list(dict.fromkeys(unit.roi for unit in left))[:n]
            settled: list[Unit] = []
            try:
                for outcome in self._group(item, [u for u in left if u.roi in rois], ledger):
                    settled.append(outcome.unit)
                    yield outcome
            except MemoryError:
                if len(rois) == 1:
                    raise MemoryBudgetExceeded(
                        f"out of memory with one ROI, {rois[0]} of subject {item.subject}; {LESS}"
                    ) from None
                throttle = Throttle((len(rois) + 1) // 2)
                relieve()
            left = [unit for unit in left if unit not in settled]

    def _group(self, item: Batch, units: Sequence[Unit], ledger: Ledger) -> Iterator[Outcome]:
        """Units whose regions are read together."""
        cfg, notes = self._job.cfg, Notes()
        try:
            with notes.listening():
                subject = self._subject(item)
            bad = {name: why for found in subject.regions for name, why in found.bad.items()}
            yield from (
                failed(unit, InputError(bad[unit.roi]), ledger, notes)
                for unit in units
                if unit.roi in bad
            )
            units = [unit for unit in units if unit.roi not in bad]
            if not units:
                return
            if isinstance(cfg, RoiConfig):
                yield from self._write(cfg, subject, units, ledger, notes)
            elif isinstance(cfg, MvpaJobConfig):
                yield from self._decode(cfg, subject, item, units, ledger, notes)
        except (MemoryError, ResourceError):
            raise
        except Exception as error:  # each unit's record says what it was
            yield from (
                failed(unit, error, ledger, notes) for unit in units if not ledger.is_done(unit)
            )

    def _subject(self, item: Batch) -> Subject:
        """Its headers and masks, kept for the next item: reading masks takes longer than an ROI."""
        if self._opened is None or self._opened[0] != item.runs:
            self._opened = None
            self._opened = item.runs, Subject.open(self._job.cfg, item.runs, self._job.rois)
        return self._opened[1]

    def _write(
        self, cfg: RoiConfig, subject: Subject, units: Sequence[Unit], ledger: Ledger, notes: Notes
    ) -> Iterator[Outcome]:
        """Every run's series of every region to a file of its own."""
        by_roi = {unit.roi: unit for unit in units}
        rows: dict[str, list[dict[str, Any]]] = {roi: [] for roi in by_roi}
        for unit in units:
            ledger.begin(unit)
        started = time.monotonic()
        with Peak() as peak, notes.listening():
            for one in run_series(
                cfg,
                subject,
                list(by_roi),
                use_memmap=self._job.use_memmap,
                threads=self._threads,
                say=notes.reading.append,
            ):
                unit = by_roi[one.roi]
                rows[one.roi].append(save_series(cfg.run_dir, unit, subject.runs[one.index], one))
        seconds = time.monotonic() - started
        for roi, unit in by_roi.items():
            fields = roi_fields(cfg, subject, self._spec(roi), rows[roi])
            fields |= _cost(seconds / len(by_roi), 0.0, peak.bytes, notes)
            files = [cfg.run_dir / row["file"] for row in rows[roi]]
            ledger.finish(unit, fields, files)
            yield Outcome(unit=unit, warnings=tuple(notes.warnings))

    def _decode(
        self,
        cfg: MvpaJobConfig,
        subject: Subject,
        item: Batch,
        units: Sequence[Unit],
        ledger: Ledger,
        notes: Notes,
    ) -> Iterator[Outcome]:
        started = time.monotonic()
        with Peak() as peak, notes.listening():
            series = joined(
                cfg,
                subject,
                list(dict.fromkeys(unit.roi for unit in units)),
                scratch=cfg.run_dir,
                mapped=item.mapped,
                use_memmap=self._job.use_memmap,
                threads=self._threads,
                say=notes.reading.append,
            )
        reading = _cost((time.monotonic() - started) / len(series), 0.0, peak.bytes, notes)
        for number, unit in enumerate(units):
            own = Notes(warnings=list(notes.warnings), reading=list(notes.reading))
            note(phase=unit.unit_id)  # a worker that is stopped for its memory is told by it
            try:
                if current().pressure():
                    relieve()
                self._decode_one(cfg, subject, series[unit.roi], unit, ledger, own, reading)
                yield Outcome(unit=unit, warnings=tuple(own.warnings))
            except (MemoryError, ResourceError):
                raise
            except Exception as error:
                yield failed(unit, error, ledger, own)
            if all(later.roi != unit.roi for later in units[number + 1 :]):
                del series[unit.roi]

    def _decode_one(
        self,
        cfg: MvpaJobConfig,
        subject: Subject,
        series: Joined,
        unit: Unit,
        ledger: Ledger,
        notes: Notes,
        reading: dict[str, Any],
    ) -> None:
        from raypipe.fmri.mvpa import decode

        target = next(target for target in cfg.targets() if target.name == unit.target)
        started = time.monotonic()
        with Peak() as peak, notes.listening():
            n_volumes = [scan.n_volumes for scan in subject.scans]
            design = design_of(cfg, target, subject.runs, n_volumes, subject.t_r_s)
            design = design.left(series.volumes)
            tags = {"subject": unit.subject, "roi": unit.roi, "target": unit.target}
            patterns, decoding = design.samples(series.values), cfg.decoding_of(target)
            result = decode(patterns, design, decoding, tags=tags, weights=cfg.weight_maps)
            del patterns
        ledger.begin(unit)
        files = [save_decoding(ledger.path(unit).with_suffix(".parquet"), unit, result)]
        files += save_weights(cfg.run_dir, unit, subject, result.weights)
        fields = mvpa_fields(cfg, subject, self._spec(unit.roi), series, result)
        fields |= reading | {
            "seconds": time.monotonic() - started,
            "peak_anon_bytes": max(peak.bytes, int(reading["peak_anon_bytes"])),
            "warnings": notes.warnings,
        }
        ledger.finish(unit, fields, files)

    def _spec(self, roi: str) -> RoiSpec:
        return next(spec for spec in self._job.rois if spec.name == roi)


def failed(unit: Unit, error: Exception, ledger: Ledger, notes: Notes) -> Outcome:
    """Record why ``unit`` could not be computed."""
    known = isinstance(error, (RaypipeError, OSError))
    reason = one_line(error) if known else f"{type(error).__name__}: {one_line(error)}"
    code = 2 if isinstance(error, OSError) else getattr(error, "exit_code", 4)
    ledger.fail(unit, reason)
    return Outcome(unit=unit, reason=reason, exit_code=code, warnings=tuple(notes.warnings))


def _cost(reading_s: float, seconds: float, peak_bytes: int, notes: Notes) -> dict[str, Any]:
    return {
        "seconds_reading": reading_s,
        "seconds": seconds,
        "peak_anon_bytes": peak_bytes,
        "reading": list(notes.reading),
        "warnings": list(notes.warnings),
    }
