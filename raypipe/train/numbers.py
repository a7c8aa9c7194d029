"""The numbers of each step: read from the device one step late, checked, counted and logged.

Reading them at once would make the host wait for the device at every step. So the wishes that came
with them, to stop and to save, are known one step late too, on all ranks at the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from raypipe.errors import WorkerFailed
from raypipe.train.config import TrainConfig
from raypipe.train.context import WorkerContext
from raypipe.train.engine import StepNotes, check_finite
from raypipe.train.metrics import MetricsLog
from raypipe.train.result import Progress

# fp16 skips a few steps while the scale finds its level (halved each time); more in a row is NaN.
_MAX_SKIPPED = 25


@dataclass
class _Pending:
    """A step whose numbers are still on the device: read after the next one was launched."""

    record: dict[str, Any]
    sums: Tensor  # float64 (5,), as `StepNumbers.follow` has them
    notes: StepNotes


class StepNumbers:
    """At most one step is pending; ``progress`` and ``log`` have all those before it.

    seconds : of training up to now. stopping, save_is_due : what any rank has asked for so far.
    exhausted : a rank has no memory to go on with, so all are stopping.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        ctx: WorkerContext,
        progress: Progress,
        log: MetricsLog,
        seconds: Callable[[], float],
    ) -> None:
        self.stopping = self.save_is_due = self.exhausted = False
        self._cfg, self._ctx, self._progress, self._log = cfg, ctx, progress, log
        self._seconds = seconds
        self._pending: _Pending | None = None

    def follow(self, record: dict[str, Any], sums: Tensor, notes: StepNotes) -> None:
        """Settle the step before, whose numbers are ready, and keep this one's for later.

        record : of this step, as far as the host knows it. sums : over all ranks, on the device,
        float64 (5,): loss sum, rows counted, ranks that want to stop, save is due, ranks without
        memory.
        """
        self.settle()
        self._pending = _Pending(record, sums, notes)

    def settle(self) -> None:
        """Read, check and log the pending step, if there is one."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        loss_sum, rows, stop, save, without_memory = pending.sums.tolist()
        record, progress = pending.record, self._progress
        where = f"epoch {record['epoch']} step {record['step']}"
        if rows != record["rows"]:
            raise WorkerFailed(
                f"{where} trained on {rows:.0f} of its {record['rows']} rows over all ranks; "
                "its feeder dropped or repeated rows"
            )
        self._check_loss(loss_sum / rows, pending.notes, where)
        if not pending.notes.skipped:
            progress.epoch_loss_sum += loss_sum
            progress.epoch_rows += int(rows)
        self.exhausted = self.exhausted or without_memory > 0
        self.stopping = self.stopping or stop > 0 or self.exhausted
        self.save_is_due = self.save_is_due or save > 0
        record |= {"loss": loss_sum / rows, **_noted(pending.notes), "seconds": self._seconds()}
        self._log.append(record)
        if self._ctx.is_main:
            self._ctx.on_step(record)

    def _check_loss(self, loss: float, notes: StepNotes, where: str) -> None:
        progress = self._progress
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if notes.skipped else 0
        if progress.skipped_in_a_row > _MAX_SKIPPED:
            raise WorkerFailed(
                f"fp16 skipped {progress.skipped_in_a_row} steps in a row up to {where} (scale "
                f"{notes.scale:g}); train with amp bf16 or off, or look for NaN in the data"
            )
        if not notes.skipped:
            check_finite(loss, where, self._cfg)


def _noted(notes: StepNotes) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if notes.grad_norm is not None:
        found["grad_norm"] = float(notes.grad_norm)
    if notes.scale is not None:
        found |= {"scale": notes.scale, "skipped": notes.skipped}
    return found
