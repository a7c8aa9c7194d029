"""The learning rate as a pure function of the optimiser step, so that a cursor is its whole state.

torch's schedulers keep counters that must be saved, and warn when a scaled step was skipped; here
the loop sets the rate before every step, from this function.
"""

from __future__ import annotations

import math

from raypipe.train.config import TrainConfig


def learning_rate(cfg: TrainConfig, global_step: int, steps_per_epoch: int) -> float:
    """The rate for optimiser step ``global_step`` (from 0).

    Warm-up: (step + 1) / warmup_steps of the rate, for ``warmup_steps`` steps, whatever follows.
    "step": whole epochs count, so a drop falls on an epoch's first step. "cosine": from the end of
    warm-up to 0, which the step after the last one would have.
    """
    warm = min(1.0, (global_step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
    return cfg.lr * warm * _decay(cfg, global_step, steps_per_epoch)


def _decay(cfg: TrainConfig, global_step: int, steps_per_epoch: int) -> float:
    if cfg.schedule == "constant":
        return 1.0
    if cfg.schedule == "step":
        return cfg.gamma ** (global_step // steps_per_epoch // cfg.step_size)
    total = cfg.epochs * steps_per_epoch - cfg.warmup_steps
    done = max(0, global_step - cfg.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done / max(1, total))))
