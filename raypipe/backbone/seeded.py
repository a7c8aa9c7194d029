"""Random weights that are the same on every machine, for demos, tests and controls.

torch's own generators round differently on different CPUs, and its initialisers change between
versions; a fingerprint of the weights would then refuse to resume on another node. Here each
parameter is drawn from raw Philox words, keyed by seed and name, by exact float32 arithmetic.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

_EMBEDDING_STD = 0.02  # ViT's own for tokens and positions


def fill_random(model: nn.Module, seed: int) -> nn.Module:
    """Overwrite ``model``'s random parameters by seeded ones, in place; returns it.

    What its constructor set to one value (norms, zero biases, layer scale) or froze (sine
    positions) stays, and so do buffers: all that is the same everywhere as it is. For this the
    model must not be frozen yet; raises ValueError if it is.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the model is frozen, so what its constructor froze cannot be told")
    for name, owner, parameter in _parameters(model):
        if parameter.requires_grad and bool(parameter.min() != parameter.max()):
            bound = np.float32(math.sqrt(3.0) * _std(name, owner, parameter))
            values = _uniform(f"{seed}:{name}", parameter.numel()) * bound
            parameter.data.copy_(torch.from_numpy(values).view(parameter.shape))
    return model


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """(dotted name, module that owns it, parameter); a shared parameter once, by its first name."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and parameter.numel():
                seen.add(id(parameter))
                yield f"{prefix}.{leaf}" if prefix else leaf, module, parameter


def _std(name: str, owner: nn.Module, parameter: nn.Parameter) -> float:
    """LeCun's standard deviation for weights: with it residual networks stay of order one.

    He's would not: ResNet-50's last map then has a standard deviation of 1200 (it counts on batch
    norm's statistics, and random weights have none), too near to float16's end.
    """
    if parameter.ndim >= 2 and name.endswith("weight") and not isinstance(owner, nn.Embedding):
        return math.sqrt(1.0 / parameter[0].numel())
    return _EMBEDDING_STD


def _uniform(key: str, n: int) -> np.ndarray:
    """(n,) float32, uniform in [-1, 1): the upper 24 bits of 32-bit halves of raw Philox words."""
    words = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=16).digest(), dtype="<u8")
    raw = np.random.Philox(key=words).random_raw((n + 1) // 2).astype("<u8").view("<u4")[:n]
    return (raw >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
