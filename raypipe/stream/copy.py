"""Rows of one source -> their place in a tensor of the batch: plain, cast, joined, in file order.

Runs in the gatherer's threads; each path spends its time in one call that releases the GIL. What
cannot be copied straight goes through a stage that stays in the cache, never through a second
buffer of a batch's size.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from raypipe.stream.reading import Readable

if TYPE_CHECKING:
    import torch

# From here on a row is copied by a call of its own: below, the call costs more than a second copy.
_LARGE_ROW_BYTES = 32 << 10
# Numbers in the stage. torch casts fewer than 32768 in the calling thread; more would start an
# OpenMP team in each of ours.
_STAGE = (1 << 15) - 1
_STAGE_BYTES = _STAGE * 8
#: Host bytes that a thread may hold for stages.
STAGE_BYTES = 2 * _STAGE_BYTES


class Target:
    """Where one source goes in a batch: ``raw`` (rows, lines, bytes) and ``wide`` (rows, lines,
    columns), views of the same memory.

    ``cast``: whether the source's dtype is another than the tensor's.
    """

    def __init__(self, raw: np.ndarray, wide: torch.Tensor, cast: bool) -> None:
        self.raw, self.wide, self.cast = raw, wide, cast


_own = threading.local()  # each thread's stage


def copy_rows(block: Readable, rows: np.ndarray, places: np.ndarray, target: Target) -> None:
    """Row ``rows[i]`` goes to ``places[i]`` of the target: both (n,) ints, read in this order.

    Raises as `Readable.check` and `Readable.take`.
    """
    if rows.size == 0:
        return
    _, lines, width = target.wide.shape
    if target.cast:
        copy = _in_pieces if lines * width > _STAGE // 2 else _staged
        copy(block, rows, places, target)
        return
    first = int(places[0])
    whole = target.raw[first : first + rows.size]
    if _in_turn(places) and whole.flags.c_contiguous:
        block.take(rows, whole.reshape(rows.size, -1))
    elif block.source.row_bytes < _LARGE_ROW_BYTES:
        _staged(block, rows, places, target)
    elif whole[0].flags.c_contiguous:
        block.check(rows)  # as `part` does not
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            block.part(row, 0, target.raw[place].reshape(-1))
    else:
        _in_pieces(block, rows, places, target)


def _staged(block: Readable, rows: np.ndarray, places: np.ndarray, target: Target) -> None:
    """Small rows, many at a time: the source -> the stage -> their places."""
    import torch

    _, lines, width = target.wide.shape
    each = max(1, min(_STAGE // max(1, lines * width), _STAGE_BYTES // block.source.row_bytes))
    for lo in range(0, rows.size, each):
        picked, to = rows[lo : lo + each], places[lo : lo + each]
        raw, numbers = _stage(block, picked.size * lines * width)
        block.take(picked, raw.reshape(picked.size, -1))
        at: Any = slice(int(to[0]), int(to[0]) + to.size) if _in_turn(to) else to
        if not target.cast:
            target.raw[at] = raw.reshape(picked.size, lines, -1)
            continue
        batch = numbers.view(picked.size, lines, width)
        if isinstance(at, slice):
            target.wide[at].copy_(batch)
        else:
            target.wide[torch.from_numpy(to)] = batch.to(target.wide.dtype)


def _in_pieces(block: Readable, rows: np.ndarray, places: np.ndarray, target: Target) -> None:
    """Large rows, a piece of one at a time: whole lines, or part of one."""
    block.check(rows)  # as `part` does not
    _, lines, width = target.wide.shape
    size = block.source.stored_dtype.itemsize
    columns = min(width, _STAGE)
    height = max(1, _STAGE // columns)
    for row, place in zip(rows.tolist(), places.tolist(), strict=True):
        for line in range(0, lines, height):
            for column in range(0, width, columns):
                h, w = min(height, lines - line), min(columns, width - column)
                raw, numbers = _stage(block, h * w)
                block.part(row, (line * width + column) * size, raw)
                if target.cast:
                    piece = target.wide[place, line : line + h, column : column + w]
                    piece.copy_(numbers.view(h, w))
                else:
                    end = (column + w) * size
                    target.raw[place, line : line + h, column * size : end] = raw.reshape(h, -1)


def _stage(block: Readable, count: int) -> tuple[np.ndarray, torch.Tensor]:
    """This thread's stage for ``count`` numbers of the source: as bytes and as numbers."""
    import torch

    if not hasattr(_own, "memory"):
        _own.memory = torch.empty(STAGE_BYTES, dtype=torch.uint8)
        _own.raw = _own.memory.numpy()
    used = count * block.source.stored_dtype.itemsize
    if used > STAGE_BYTES:  # one row that is neither large nor small: only without a cast
        raise AssertionError(f"stage of {used} bytes")
    dtype = getattr(torch, block.source.dtype)
    return _own.raw[:used], _own.memory[:used].view(dtype)


def _in_turn(places: np.ndarray) -> bool:
    return bool(places[-1] - places[0] == places.size - 1 and (np.diff(places) == 1).all())
