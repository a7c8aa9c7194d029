"""Where a fit stands, and what it came to: saved in each checkpoint, given back at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raypipe.stream import Cursor
from raypipe.train import checkpoint
from raypipe.train.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a fit came to; epochs count from 0. ``stopped``: ended early on request; the same call
    goes on.
    """

    run_dir: Path
    best_epoch: int | None
    best_val_loss: float | None
    epochs: int
    global_steps: int
    history: tuple[dict[str, Any], ...]
    stopped: bool
    seconds: float
    n_parameters: int


@dataclass
class Progress:
    """Where a run stands; saved in each checkpoint's meta.json.

    owes_validation : all steps of the epoch before ``epoch`` are done, and it is not validated yet.
    """

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    epoch_loss_sum: float = 0.0
    epoch_rows: int = 0
    seconds: float = 0.0
    skipped_in_a_row: int = 0
    best_epoch: int | None = None
    best_val_loss: float | None = None
    best_cost: float | None = None
    owes_validation: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.best_cost is None:  # a checkpoint from before there was another cost
            self.best_cost = self.best_val_loss

    def epoch_record(self, metrics: Mapping[str, float], best: bool) -> dict[str, Any]:
        """The line of metrics.jsonl about the epoch whose steps are done."""
        rows = self.epoch_rows
        return {
            "kind": "epoch",
            "epoch": self.epoch - 1,
            "global_step": self.global_step,
            "train_loss": self.epoch_loss_sum / rows if rows else math.nan,
            **metrics,
            "best": best,
        }

    def is_over(self, cfg: TrainConfig) -> bool:
        """Whether all epochs are done, or ``cfg.patience`` of them without a better one."""
        if self.owes_validation:
            return False
        if self.epoch >= cfg.epochs:
            return True
        if not cfg.patience or self.step or self.best_epoch is None:
            return False
        return self.epoch - 1 - self.best_epoch >= cfg.patience

    @property
    def words(self) -> str:
        """`cursor`, for people."""
        owed = f", once epoch {self.epoch - 1} is validated" * self.owes_validation
        return f"epoch {self.epoch} step {self.step}{owed}"

    @property
    def cursor(self) -> Cursor:
        """The next step to do."""
        return Cursor(self.epoch, self.step)

    def result(
        self, run_dir: Path, *, cfg: TrainConfig, seconds: float, n_parameters: int
    ) -> FitResult:
        """The result of a fit by ``cfg`` that ends here."""
        return FitResult(
            run_dir=run_dir,
            best_epoch=self.best_epoch,
            best_val_loss=self.best_val_loss,
            epochs=self.epoch,
            global_steps=self.global_step,
            history=tuple(self.history),
            stopped=not self.is_over(cfg),
            seconds=seconds,
            n_parameters=n_parameters,
        )


def finished(run_dir: Path, cfg: TrainConfig, n_parameters: int) -> FitResult | None:
    """The result of the fit in ``run_dir``, if it is over by ``cfg``; else None.

    Raises StoreCorrupt as `checkpoint.newest`.
    """
    found = checkpoint.newest(run_dir)
    progress = Progress(**found.meta["progress"]) if found else Progress()
    if not progress.is_over(cfg):
        return None
    return progress.result(run_dir, cfg=cfg, seconds=progress.seconds, n_parameters=n_parameters)
