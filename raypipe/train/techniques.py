"""What a training step may use to take less memory, and the sets of these that are looked at.

Mild is, in this order: what was asked for; channels_last, which changes a layout; checkpointing,
which computes again; AMP, which alone changes numbers; all of them. What each set takes, and which
is chosen, is ``planner``; how a step applies them is ``precision``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from raypipe.train.config import TrainConfig

_NO_BLOCKS = "this model names no blocks to recompute"
_NO_CONVOLUTIONS = "this model has no 2-D convolutions"

Amp = Literal["off", "bf16", "fp16"]


@dataclass(frozen=True)
class Techniques:
    """What a step may use to take less memory."""

    amp: Amp = "off"
    checkpointing: bool = False
    channels_last: bool = False

    @property
    def name(self) -> str:
        """``fp32``, ``AMP bf16``, ``checkpointing + channels_last``, ..."""
        parts = [f"AMP {self.amp}"] if self.amp != "off" else []
        parts += [n for n in ("checkpointing", "channels_last") if getattr(self, n)]
        return " + ".join(parts) or "fp32"

    @classmethod
    def of(cls, cfg: TrainConfig) -> Techniques:
        """Those of ``cfg``."""
        return cls(cfg.amp, cfg.checkpointing, cfg.channels_last)

    def within(self, other: Techniques) -> bool:
        """Whether ``other`` has all of these."""
        amp = self.amp in ("off", other.amp)
        flags = ("checkpointing", "channels_last")
        return amp and all(getattr(other, n) or not getattr(self, n) for n in flags)

    def possible(self, *, blocks: bool, convolutions: bool) -> Techniques:
        """Those of these that the model has a use for."""
        return replace(
            self,
            checkpointing=self.checkpointing and blocks,
            channels_last=self.channels_last and convolutions,
        )

    def why_not(self, possible: Techniques) -> str:
        """Why only ``possible`` of these can be of use."""
        reasons = [_NO_BLOCKS] if self.checkpointing and not possible.checkpointing else []
        reasons += [_NO_CONVOLUTIONS] if self.channels_last and not possible.channels_last else []
        return f"as {possible.name}: {', '.join(reasons)}"


def techniques_of(cfg: TrainConfig, amp: Amp) -> list[Techniques]:
    """The sets to look at, each once: fp32, each technique alone, all; and on top of what ``cfg``
    asks for the same. The mildest first.
    """
    bases = [Techniques(), Techniques.of(cfg)]
    steps: list[dict[str, Any]] = [
        {},
        {"channels_last": True},
        {"checkpointing": True},
        {"amp": amp},
        {"amp": amp, "checkpointing": True, "channels_last": True},
    ]
    return list(dict.fromkeys(replace(base, **step) for step in steps for base in bases))


def mixed_type(cfg: TrainConfig, device: torch.device) -> Amp:
    """AMP's type: the asked one, else bf16 (which needs no loss scale) where the device has it."""
    if cfg.amp != "off":
        return cfg.amp
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"
    return "bf16"
