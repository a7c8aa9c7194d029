"""When a fit saves, and what: its checkpoints hold all that going on from there needs.

How a checkpoint is written, found and thrown away is ``checkpoint``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from raypipe.memory import guard
from raypipe.train import checkpoint
from raypipe.train.config import TrainConfig
from raypipe.train.context import WorkerContext
from raypipe.train.engine import Engine
from raypipe.train.metrics import MetricsLog
from raypipe.train.result import Progress


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

    def is_due_by_steps(self) -> bool:
        """Whether the step that ended is one of ``cfg.checkpoint_every_steps``."""
        every = self._cfg.checkpoint_every_steps
        return every > 0 and self._progress.global_step % every == 0

    def is_due_by_time(self) -> bool:
        """Rank 0's own view: clocks differ, so the others learn it with the step's sums."""
        every_s = self._cfg.checkpoint_every_s
        return self._ctx.is_main and 0 < every_s <= self._ctx.clock() - self._saved_at

    def save(self, *, best: bool) -> None:
        """Checkpoint; best before last, so that a last that knows of a best finds it there.

        "judged" in meta.json: the weights beside it are those that the last entry of the history was
        measured on. The best are; the last are not when they went on, or when their average was judged.
        """
        guard.note(phase="save")
        self._progress.seconds = self._seconds()
        state = self._engine.training_state()
        meta = {
            "progress": asdict(self._progress),
            "stream": self._stream,
            "metrics_bytes": self._log.sync(),
            "versions": {"torch": torch.__version__, "numpy": np.__version__},
        }

        def write() -> None:
            if best:
                judged = {"model": self._engine.judged_state()}
                checkpoint.save(self._ctx.run_dir, "best", judged, {**meta, "judged": True})
            contents = {"model": self._engine.model_state(), "state": state}
            about = {**meta, "judged": self._last_is_judged()}
            checkpoint.save(self._ctx.run_dir, "last", contents, about, self._cfg.keep)

        self._ctx.on_main(write)
        self._saved_at = self._ctx.clock()

    def _last_is_judged(self) -> bool:
        at = self._progress
        return bool(at.history) and at.step == 0 and self._cfg.ema_decay is None
