"""numba's compiler as the kernels of this room use it: no GIL, and kept on disk where that can be.

Importing a module of kernels compiles it, a few seconds once a machine: only what runs them does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

# Sums may be reordered, products fused; NaN and infinity keep their meaning.
_MATH = {"reassoc", "contract", "nsz"}


def compiled(signature: str) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that compiles for ``signature`` at once."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return njit(signature, nogil=True, cache=True, fastmath=_MATH)(function)
        except RuntimeError:  # no folder that a cache could be kept in
            return njit(signature, nogil=True, fastmath=_MATH)(function)

    return decorate
