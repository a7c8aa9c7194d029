"""An exponential moving average of a model's weights: smoother ones, judged and kept as the best.

After each optimiser step    average += (1 - d) (weights - average),   d = min(decay, (1 + n)/(10 + n))

with n the steps taken so far, so that the first ones are soon forgotten. Batch norm's running
statistics (all buffers of floating type) are averaged alike, so that they belong to the averaged
weights; counters are copied. Validation sees the averaged model, RUN/best holds it; RUN/last holds
the plain weights, and the average beside them to go on from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of ``module``'s parameters and buffers, on its device, in their own types."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._live = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self._average = {name: tensor.detach().clone() for name, tensor in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the weights as they are now: once after each optimiser step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        floating = [name for name, tensor in self._live.items() if tensor.is_floating_point()]
        averages = [self._average[name] for name in floating]
        torch._foreach_lerp_(averages, [self._live[name] for name in floating], 1 - decay)
        for name in self._live.keys() - set(floating):
            self._average[name].copy_(self._live[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module with the averaged tensors in place of its own; nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def tensors(self) -> list[Tensor]:
        """What the average takes of the device."""
        return list(self._average.values())

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; the decay is the options'."""
        average = {name: tensor.cpu() for name, tensor in self._average.items()}
        return {"updates": self.updates, "average": average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`. Raises KeyError, RuntimeError when it is of another model."""
        if state["average"].keys() != self._average.keys():
            raise KeyError("the averaged weights are of another model")
        self.updates = int(state["updates"])
        for name, tensor in self._average.items():
            tensor.copy_(state["average"][name])

    def _swap(self) -> None:
        for name, tensor in self._live.items():
            tensor.data, self._average[name] = self._average[name], tensor.data
