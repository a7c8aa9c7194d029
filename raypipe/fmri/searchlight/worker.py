"""The worker of searchlights: makes a block's spheres, reads and scores them, puts the block on the disk.

An ordinary class (``runner.StepWorker``). A block's file is there before it is reported, so a worker
that dies loses the block under way and no other. What cannot be used ends its map with a reason; only
memory and the disk end the run.
"""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass

from threadpoolctl import threadpool_limits

from raypipe.errors import InputError, MemoryBudgetExceeded, ResourceError
from raypipe.fmri.ledger import Ledger
from raypipe.fmri.peak import Peak
from raypipe.fmri.searchlight.blockfile import SavedBlock, block_path, key_of, save_block
from raypipe.fmri.searchlight.items import LESS, LightItem, merged
from raypipe.fmri.searchlight.job import SearchlightJobConfig
from raypipe.fmri.searchlight.opened import OpenMap, OpenSubject
from raypipe.fmri.searchlight.score import BlockScores
from raypipe.fmri.units import RoiSpec, Unit
from raypipe.fmri.work import Notes, Outcome, failed
from raypipe.memory.guard import current, note, relieve
from raypipe.memory.policy import Throttle
from raypipe.runner import Done


@dataclass(frozen=True, kw_only=True)
class LightShared:
    """What all workers of a run share. reads : blocks that a scan is likely to be asked for."""

    cfg: SearchlightJobConfig
    rois: tuple[RoiSpec, ...]
    use_memmap: bool
    reads: int


class LightWorker:
    """Scores blocks, with one BLAS thread; see the module."""

    def __init__(self) -> None:
        self._blas = threadpool_limits(1)
        self._id = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._shared: LightShared | None = None
        self._subject: OpenSubject | None = None
        self._failed: dict[Unit, Outcome] = {}

    def describe(self) -> str:
        """Which process this is."""
        return self._id

    def open(self, shared: LightShared) -> str:
        """Take the run's options. Raises InputError when this machine does not see its folder."""
        if not shared.cfg.run_dir.is_dir():
            raise InputError(
                f"{os.uname().nodename} does not see {shared.cfg.run_dir}; put --run-dir on a disk that "
                "every machine mounts"
            )
        self._let_go()
        self._shared, self._failed = shared, {}
        return self._id

    def step(self, item: LightItem, upcoming: LightItem | None) -> list[Done]:
        """Score the block, unless it is done or its map has failed here before."""
        return [Done(item.key, self._outcome(item))]

    def drain(self) -> list[Done]:
        """Nothing is held back."""
        return []

    def close(self) -> None:
        """Let go of scans, and give BLAS its threads back."""
        self._let_go()
        self._blas.restore_original_limits()

    @property
    def _job(self) -> LightShared:
        if self._shared is None:
            raise RuntimeError("a worker is opened before its first step")
        return self._shared

    def _outcome(self, item: LightItem) -> Outcome:
        run_dir = self._job.cfg.run_dir
        path = block_path(run_dir, item.unit, item.number)
        if key_of(path) == item.block_key:  # by a worker that died
            return Outcome(unit=item.unit, found=True)
        if item.unit in self._failed:
            return self._failed[item.unit]
        notes = Notes()
        try:
            block = self._compute(item, notes)
            save_block(path, item.block_key, block)
        except (MemoryError, ResourceError):
            raise
        except Exception as error:  # the map's record says what it was
            told = failed(item.unit, error, Ledger(run_dir), notes)
            self._failed[item.unit] = told
            return told
        danger = block.scores.warning
        return Outcome(unit=item.unit, warnings=(*notes.warnings, *([danger] if danger else [])))

    def _compute(self, item: LightItem, notes: Notes) -> SavedBlock:
        with Peak() as peak, notes.listening():
            started = time.monotonic()
            of = self._opened(item).map_of(item.unit, notes.reading.append)
            ready = time.monotonic()
            scores = self._score(item, of)
        own = item.centres
        return SavedBlock(
            scores=scores,
            seconds=time.monotonic() - ready,
            seconds_reading=ready - started,
            peak_anon_bytes=peak.bytes,
            not_finite=int(of.runs.not_finite[own].sum()),
            constant=int(of.runs.constant[own].sum()),
            n_samples=len(of.design),
            n_folds=of.n_folds(),
            chance=of.chance(),
            ways=of.runs.ways,
            warnings=tuple(notes.warnings),
        )

    def _score(self, item: LightItem, of: OpenMap) -> BlockScores:
        """All centres, fewer at once when memory is short."""
        throttle = Throttle(item.at_once)
        left, parts = item.centres, list[BlockScores]()
        while left.size:
            if pressed := current().pressure():
                relieve()
            n = throttle.next(pressed)
            note(step=item.number, batch=n, phase=item.unit.unit_id)
            try:
                parts.append(of.score(left[:n]))
            except MemoryError:
                throttle = self._halved(item, min(n, len(left)))
                continue
            left = left[n:]
        return merged(item.number, parts)

    def _halved(self, item: LightItem, n: int) -> Throttle:
        relieve()
        if n == 1:
            raise MemoryBudgetExceeded(
                f"out of memory with one sphere of {item.unit.unit_id}; {LESS}"
            ) from None
        return Throttle((n + 1) // 2)

    def _opened(self, item: LightItem) -> OpenSubject:
        if self._subject is None or self._subject.files != item.runs:
            self._let_go()
            job = self._job
            self._subject = OpenSubject(
                cfg=job.cfg,
                rois=job.rois,
                files=item.runs,
                reads=job.reads,
                use_memmap=job.use_memmap,
            )
        return self._subject

    def _let_go(self) -> None:
        if self._subject is not None:
            self._subject.close()
            self._subject = None
