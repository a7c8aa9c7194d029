"""Whether what comes before and after the model works pixel by pixel, tried on the image itself.

A tile is all that such a function sees: one that looks at its neighbours, or at the largest value,
would give each tile another result, and no seam would say so. Tried on parts of two small pieces: what
is the same on both, by chance or on an even background, is not found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from raypipe.errors import InputError
from raypipe.tile.grid import Box
from raypipe.tile.source import Source

_SIDE = 16  # pixels of a piece
_ROUNDINGS = 64  # of the largest value: vector code rounds otherwise at the ends of an array


def prepared_channels(source: Source, prepare: Callable[[np.ndarray], np.ndarray] | None) -> int:
    """Channels that the model is given. Raises InputError unless ``prepare`` is pixel by pixel."""
    if prepare is None:
        return source.channels
    for middle in (False, True):
        box = tuple(_piece(n, middle=middle) for n in source.space)
        pixels = source.read(0, box)
        whole = prepare(pixels.copy())
        if whole.shape[1:] != pixels.shape[1:]:
            raise InputError(
                f"prepare gives {whole.shape} for a window {pixels.shape}; it must keep (channels, *space)"
            )
        for part in _parts(pixels.shape[1:]):
            at = (slice(None), *part)
            _check("prepare", whole[at], prepare(pixels[at].copy()))
    return len(whole)


def check_after(after: Callable[[Tensor], Tensor], out: Tensor) -> None:
    """Raises InputError unless ``after`` of a part of ``out`` (n, channels, *space) is that part of it."""
    whole = after(out.clone())
    for part in _parts(out.shape[2:]):
        at = (slice(None), slice(None), *part)
        _check("after", _array(whole[at]), _array(after(out[at].clone())))


def _piece(size: int, *, middle: bool) -> slice:
    lo = max(0, size - _SIDE) // 2 if middle else 0
    return slice(lo, min(size, lo + _SIDE))


def _parts(space: Sequence[int]) -> list[Box]:
    """The first and the last half of each axis, all ways: the largest value is not in each of them."""
    halves = [(slice(0, max(1, n // 2)), slice(n // 2, n)) for n in space]
    return list(product(*halves))


def _array(out: Tensor) -> np.ndarray:
    return out.to(torch.float64).cpu().numpy() if out.dtype == torch.bfloat16 else out.cpu().numpy()


def _check(name: str, wanted: np.ndarray, got: np.ndarray) -> None:
    if wanted.shape == got.shape:
        if wanted.dtype.kind != "f":
            same = np.array_equal(wanted, got)
        else:
            finite = np.abs(wanted[np.isfinite(wanted)])
            atol = _ROUNDINGS * float(np.finfo(wanted.dtype).eps) * float(finite.max(initial=0))
            same = np.allclose(wanted, got, rtol=0, atol=atol, equal_nan=True)
        if same:
            return
    raise InputError(
        f"{name} is not pixel by pixel: a part of the image by itself gives other values than within a "
        "larger part; take out what looks at several pixels (a mean, a maximum, a filter), or put "
        "numbers of the whole image there"
    )
