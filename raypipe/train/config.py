"""The options of training, checked when they are made.

What they do: the loop's steps in ``loop``, the learning rate in ``schedule``, the techniques in
``precision``. A task's own options (sizes, readouts) belong to its room.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from raypipe.errors import ConfigError
from raypipe.units import parse_bytes


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a model is trained.

    The defaults of epochs, batch_size, lr, weight_decay, step_size and clip_norm are those of Adeli
    et al.'s transformer brain encoder (github.com/Hosseinadeli/transformer_brain_encoder, main.py).
    Raises ConfigError when a value breaks its rule.
    """

    epochs: int = 15
    """Passes over all training rows."""
    batch_size: int = 16
    """Rows that one worker computes at once (a micro batch)."""
    accumulate: int = 1
    """Micro batches of one worker in one optimiser step."""
    lr: float = 5e-4
    """AdamW's learning rate, before warm-up and schedule."""
    weight_decay: float = 1e-4
    """AdamW's decoupled weight decay, on all parameters."""
    schedule: Literal["step", "cosine", "constant"] = "step"
    """Learning rate over time: times gamma every step_size epochs, a half cosine to 0, or level."""
    step_size: int = 4
    """Epochs between drops of the "step" schedule."""
    gamma: float = 0.1
    """Factor of a drop of the "step" schedule."""
    warmup_steps: int = 0
    """Optimiser steps over which the learning rate rises linearly from 0."""
    clip_norm: float | None = 0.1
    """Largest norm of the (unscaled) gradient; None does not clip."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Autocast type; fp16 scales the loss (see init_scale)."""
    init_scale: float = 65536.0
    """fp16: the first loss scale. torch's default; lower it when the first steps are skipped."""
    checkpointing: bool = False
    """Recompute the blocks' activations in the backward pass instead of keeping them."""
    use_reentrant: bool = False
    """Checkpointing by torch's reentrant variant; the other one is what torch recommends."""
    channels_last: bool = False
    """NHWC memory format where the model has 2-D convolutions."""
    compile: bool = False
    """Compile the model by torch.compile; with checkpointing, block by block."""
    compile_backend: str = "inductor"
    """torch.compile's backend."""
    sync_batch_norm: bool = False
    """Batch norm over the rows of all workers (CUDA, several workers)."""
    ema_decay: float | None = None
    """Average the weights over steps with this decay, e.g. 0.999, and validate the average; None:
    no average."""
    fit_gpu: str | None = None
    """Device memory to stay within, e.g. 12GiB: the mildest techniques and the largest micro batch
    that fit are chosen; the rows of a step stay. Without a GPU it is the memory of torch's tensors.
    """
    predict_memory: bool | None = None
    """Measure what a step takes of the device, with each technique: by default on CUDA and in a dry
    run; on a CPU it takes as long as some steps."""
    seed: int = 0
    """Seeds the weights, the order of rows and (with the rank) dropout."""
    shuffle_window: int = 0
    """Shuffle within windows of so many rows, read as 16 pieces of neighbours, for disks that dislike
    jumping: choose it so that a piece is some megabytes; 0: shuffle over all rows."""
    checkpoint_every_steps: int = 0
    """Also write a checkpoint every so many optimiser steps; 0: not by steps."""
    checkpoint_every_s: float = 600.0
    """Also write one when so many seconds have passed since the last; 0: not by time. The first one
    of a run is written after a minute, where that is sooner.

    Ten minutes are little to lose; writing the default encoder's 0.4 GB takes about a second.
    """
    patience: int = 0
    """Stop after so many epochs without a better one (early stopping); 0: do all epochs."""
    keep: int = 2
    """Generations of the last checkpoint on disk; the older ones stand in for a damaged one."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "step_size", "keep"):
            self._require(name, getattr(self, name) >= 1, "give at least 1")
        whole = ("warmup_steps", "seed", "shuffle_window", "checkpoint_every_steps", "patience")
        for name in whole:
            self._require(name, getattr(self, name) >= 0, "give 0 or more")
        for name in ("lr", "init_scale"):
            self._require(name, _finite(getattr(self, name), above=0), "give a number above 0")
        decay, every_s = self.weight_decay, self.checkpoint_every_s
        self._require(
            "checkpoint_every_s", math.isfinite(every_s) and every_s >= 0, "give 0 or more"
        )
        self._require("weight_decay", math.isfinite(decay) and decay >= 0, "give 0 or more")
        self._require("gamma", 0 < self.gamma <= 1, "give a factor in (0, 1]")
        clip = self.clip_norm
        self._require("clip_norm", clip is None or _finite(clip, above=0), "give above 0, or None")
        decay = 0.0 if self.ema_decay is None else self.ema_decay
        self._require("ema_decay", 0 <= decay < 1, "give a factor in [0, 1), or None")
        schedules = ("step", "cosine", "constant")
        self._require("schedule", self.schedule in schedules, f"one of {', '.join(schedules)}")
        budget = self.fit_gpu_bytes
        self._require("fit_gpu", budget is None or budget > 0, "give a size such as 12GiB")
        self._require("amp", self.amp in ("off", "bf16", "fp16"), "one of off, bf16, fp16")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigError(f"train {name}={getattr(self, name)!r}: {rule}")

    @property
    def fit_gpu_bytes(self) -> int | None:
        """``fit_gpu`` as a number of bytes."""
        return None if self.fit_gpu is None else parse_bytes(self.fit_gpu)

    def rows_per_step(self, world: int) -> int:
        """Rows of one optimiser step over ``world`` workers."""
        return self.batch_size * self.accumulate * world

    def read_ahead(self, world: int) -> int | None:
        """Micro batches of one of ``world`` workers in a window, to be read together; None without."""
        return -(-self.shuffle_window // (self.batch_size * world)) or None

    def recipe(self) -> dict[str, object]:
        """The options that a resumed run must share with the one that it goes on from.

        Left out is what may change without changing the steps: the split of a step into micro
        batches, checkpointing, memory format, how often to save, and, unless the cosine stretches
        over them, how many epochs to run.
        """
        names = ["lr", "weight_decay", "schedule", "warmup_steps", "clip_norm", "amp", "seed"]
        names += {"step": ["step_size", "gamma"], "cosine": ["epochs"]}.get(self.schedule, [])
        # Named where they are used only, so that runs from before they existed go on.
        later = ("sync_batch_norm", "ema_decay", "shuffle_window")
        names += [name for name in later if getattr(self, name)]
        return {name: getattr(self, name) for name in names}


def _finite(value: float, *, above: float) -> bool:
    return math.isfinite(value) and value > above
