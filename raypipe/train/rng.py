"""The state of every random generator that training may draw from, saved and put back.

torch (CPU and the worker's CUDA device), numpy's legacy global one and Python's. States are plain
tensors, ints and strings, so that a checkpoint loads with ``weights_only=True``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

State = dict[str, Any]


def capture(device: torch.device) -> State:
    """All generators' states, as tensors and plain values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: State = {
        "numpy": [str(name), torch.from_numpy(np.asarray(keys, np.int64)), int(position)],
        "numpy_gauss": [int(has_gauss), float(cached)],
        "python": [version, list(words), gauss],
    }
    return state | torch_state(device)


def torch_state(device: torch.device) -> State:
    """torch's part of `capture`: dropout's. Microseconds, so for every step; numpy's take 150."""
    state: State = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore(state: State, device: torch.device) -> None:
    """Put all generators back; a CUDA state is left out on the CPU, and the reverse."""
    torch.set_rng_state(state["torch"].cpu())
    name, keys, position = state["numpy"]
    has_gauss, cached = state["numpy_gauss"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def seed_all(*key: int) -> None:
    """Seed all generators from ``key``, e.g. (seed,) for the weights, (seed, 1 + rank) after."""
    words = np.random.SeedSequence(key[0], spawn_key=key[1:]).generate_state(3, np.uint32)
    torch.manual_seed(int(words[0]))  # CUDA devices too
    np.random.seed(int(words[1]))
    random.seed(int(words[2]))


@contextmanager
def preserved(device: torch.device) -> Iterator[None]:
    """Give the caller its generators back as they were: they are the process's only ones."""
    before = capture(device)
    try:
        yield
    finally:
        restore(before, device)
