"""When a fit saves, and what: its checkpoints hold all that going on from there needs. And which
one it begins from.

How a checkpoint is written, found and thrown away is ``checkpoint``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from raypipe.errors import ConfigError, StoreError, StoreLocked
from raypipe.memory import guard
from raypipe.store.flocks import held
from raypipe.train import checkpoint
from raypipe.train.config import TrainConfig
from raypipe.train.context import WorkerContext
from raypipe.train.engine import Engine
from raypipe.train.metrics import METRICS_FILE, MetricsLog
from raypipe.train.result import Progress

# Of a run without a checkpoint: a full disk, or memory that ends it, shows in its first minutes.
FIRST_S = 60.0
LOCK = ".rescue.lock"
# A rank that fails as well ends the run with its error, so it waits for the one that writes.
PATIENCE_S = 600.0


def begin(ctx: WorkerContext, resume: bool) -> checkpoint.Found | None:
    """The checkpoint to go on from. Rank 0 chooses it, so that all go on from the same one."""

    def choose() -> checkpoint.Found | None:
        ctx.run_dir.mkdir(parents=True, exist_ok=True)
        if not resume:
            checkpoint.discard(ctx.run_dir)
        return checkpoint.newest(ctx.run_dir)

    found: checkpoint.Found | None = ctx.on_main(choose)
    ctx.together(lambda: _check_visible(found, ctx))
    return found


def log_fields(found: checkpoint.Found | None) -> tuple[int, list[dict[str, Any]]]:
    """Where the checkpoint saw metrics.jsonl: its length, and the records that were not in it yet."""
    meta = found.meta if found else {}
    return meta.get("metrics_bytes", 0), meta.get("metrics_tail", [])


def writing(ctx: WorkerContext) -> AbstractContextManager[None]:
    """Keep the other workers from writing a checkpoint: all write under the same name before it is whole.

    Raises StoreLocked, StoreError on a disk without locks, OSError.
    """
    busy = f"another worker has been saving for more than {PATIENCE_S:.0f} s"
    return held(ctx.run_dir / LOCK, busy, PATIENCE_S)


def _check_visible(found: checkpoint.Found | None, ctx: WorkerContext) -> None:
    if found and not found.path.is_dir():
        raise ConfigError(f"worker {ctx.rank} cannot see {found.path}; put it on a shared disk")


class Saver:
    """The checkpoints of one fit, counted in time from ``started``, which is ``ctx.clock()``'s.

    stream : see ``feed.stream_record``. seconds : of training up to now.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        ctx: WorkerContext,
        engine: Engine,
        progress: Progress,
        log: MetricsLog,
        *,
        stream: Mapping[str, Any],
        started: float,
        seconds: Callable[[], float],
    ) -> None:
        self._cfg, self._ctx, self._engine = cfg, ctx, engine
        self._progress, self._log, self._stream = progress, log, stream
        self._saved_at, self._seconds = started, seconds
        self._is_first = progress.global_step == 0

    def is_due_by_steps(self) -> bool:
        """Whether the step that ended is one of ``cfg.checkpoint_every_steps``."""
        every = self._cfg.checkpoint_every_steps
        return every > 0 and self._progress.global_step % every == 0

    def is_due_by_time(self) -> bool:
        """Rank 0's own view: clocks differ, so the others learn it with the step's sums."""
        every_s = self._cfg.checkpoint_every_s
        every_s = min(every_s, FIRST_S) if self._is_first else every_s
        return self._ctx.is_main and 0 < every_s <= self._ctx.clock() - self._saved_at

    def save(self, *, best: bool) -> None:
        """Checkpoint, all ranks together; best before last, so that a last that knows of a best finds
        it there.

        "judged" in meta.json: the weights beside it are those that the last entry of the history was
        measured on. The best are; the last are not when they went on, or when their average was judged.
        """
        guard.note(phase="save")
        state, meta = self._engine.training_state(), self._meta()

        def write() -> None:
            with self._only_writer():
                if best:
                    judged = {"model": self._engine.judged_state()}
                    checkpoint.save(self._ctx.run_dir, "best", judged, {**meta, "judged": True})
                self._write_last(state, meta)

        self._ctx.on_main(write)
        self._saved_at, self._is_first = self._ctx.clock(), False

    def save_alone(self) -> None:
        """This rank's checkpoint where the others cannot be waited for: without their generators."""
        guard.note(phase="save")
        self._write_last(self._engine.training_state(alone=True), self._meta())

    @contextmanager
    def _only_writer(self) -> Iterator[None]:
        """Rank 0's: another may have to save alone meanwhile, but not where it gets no lock."""
        with ExitStack() as stack:
            if self._ctx.world > 1:
                try:
                    stack.enter_context(writing(self._ctx))
                except StoreLocked:
                    raise
                except (StoreError, OSError):
                    pass  # a disk without locks; what else it lacks, writing the checkpoint will tell
            yield

    def _meta(self) -> dict[str, Any]:
        self._progress.seconds = self._seconds()
        return {
            "progress": asdict(self._progress),
            "stream": self._stream,
            **self._log_fields(),
            "versions": {"torch": torch.__version__, "numpy": np.__version__},
        }

    def _log_fields(self) -> dict[str, Any]:
        """Where metrics.jsonl stands, which rank 0 writes."""
        if self._ctx.is_main:
            return {"metrics_bytes": self._log.sync()}
        length, tail = self._log.beside(self._ctx.run_dir / METRICS_FILE)
        return {"metrics_bytes": length, "metrics_tail": tail}

    def _write_last(self, state: dict[str, Any], meta: dict[str, Any]) -> None:
        contents = {"model": self._engine.model_state(), "state": state}
        about = {**meta, "judged": self._last_is_judged()}
        checkpoint.save(self._ctx.run_dir, "last", contents, about, self._cfg.keep)

    def _last_is_judged(self) -> bool:
        at = self._progress
        is_end = at.step == 0 and not at.owes_validation
        return bool(at.history) and is_end and self._cfg.ema_decay is None
