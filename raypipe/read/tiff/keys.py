"""What ``array[...]`` asks for, as ranges along each axis. Pure."""

from __future__ import annotations

import operator
from types import EllipsisType
from typing import Any

Key = int | slice | EllipsisType | tuple[Any, ...]


def ranges_of(key: Any, shape: tuple[int, ...]) -> tuple[list[range], tuple[int, ...]]:
    """One range an axis, and the axes that an integer took away.

    Integers (negative ones from the end), slices with any step, and one ``...``, as in NumPy.
    Raises IndexError for all else, and for what the axes do not have.
    """
    keys = key if isinstance(key, tuple) else (key,)
    if sum(one is Ellipsis for one in keys) > 1:
        raise IndexError("an index can have only one ...")
    if Ellipsis not in [one if one is Ellipsis else None for one in keys]:
        keys = (*keys, Ellipsis)
    given = len(keys) - 1
    if given > len(shape):
        raise IndexError(f"{given} indices for an array of {len(shape)} axes {shape}")
    k = next(k for k, one in enumerate(keys) if one is Ellipsis)
    keys = (*keys[:k], *[slice(None)] * (len(shape) - given), *keys[k + 1 :])
    ranges = [
        _range(one, axis, size) for axis, (one, size) in enumerate(zip(keys, shape, strict=True))
    ]
    return ranges, tuple(axis for axis, one in enumerate(keys) if not isinstance(one, slice))


def _range(one: Any, axis: int, size: int) -> range:
    if isinstance(one, slice):
        return range(*one.indices(size))
    try:
        at = operator.index(one)
    except TypeError:
        at = None
    if at is None or isinstance(one, bool):
        raise IndexError(
            f"{type(one).__name__} as an index of a stack that is not in memory; use integers, "
            "slices and ..., or np.asarray(stack[...]) of what fits into memory"
        )
    if not -size <= at < size:
        raise IndexError(f"index {at} is out of axis {axis} of {size}")
    return range(at % size, at % size + 1)
