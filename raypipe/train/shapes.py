"""Tensors without memory: a training step by its shapes alone, of any size, in a second.

Torch's fake tensors know shape, type, strides and device, and a storage that holds nothing: each
operation says what it would give, autograd keeps what it would keep, and nothing is computed. What
looks at values (``item``, a comparison in an ``if``, an output as long as the data say) cannot be run
so, and raises RuntimeError. Who counts the storages is ``footprint``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class Shapes:
    """While on (``with``), nothing is computed; a tensor with values that an operation meets is taken
    as one without.
    """

    def __init__(self) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._histograms = _Histograms()

    def __enter__(self) -> Shapes:
        self._mode.__enter__()
        self._histograms.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._histograms.__exit__(*raised)
        self._mode.__exit__(*raised)

    def of(self, tensor: Tensor) -> Tensor:
        """``tensor`` without its values; to be called while this is off."""
        return self._mode.from_tensor(tensor)

    def drop_values(self, module: nn.Module) -> None:
        """Take the memory of ``module``'s parameters and buffers away, where they are: shapes, strides
        and what needs a gradient stay; to be called while this is off.
        """
        made: dict[int, tuple[Tensor, nn.Parameter]] = {}  # what two modules share stays one
        for part in module.modules():
            for name, weight in part._parameters.items():
                if weight is None:
                    continue
                if id(weight) not in made:
                    bare = nn.Parameter(self.of(weight.detach()), weight.requires_grad)
                    made[id(weight)] = weight, bare
                part._parameters[name] = made[id(weight)][1]
            for name, buffer in part._buffers.items():
                part._buffers[name] = None if buffer is None else self.of(buffer)


class _Histograms(TorchDispatchMode):
    """Lets a histogram be as long as it was asked to be at least: how long it is, its values say."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.ops.aten.bincount.default:
            return func(*args, **(kwargs or {}))
        return _empty_histogram(*args, **(kwargs or {}))


def _empty_histogram(places: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    """As ``torch.bincount``, of ``minlength`` numbers."""
    dtype = torch.int64 if weights is None else torch.float64
    return torch.empty(minlength, dtype=dtype, device=places.device)
