"""From the numbers in a mask to what is learned: foreground, foreground with boundaries, or classes.

The plane that the loss sees is small whole numbers, with `IGNORE` where a pixel counts nowhere. Masks
of instances (0 is background, every object a number of its own) serve all three.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from raypipe.errors import InputError

Target = Literal["foreground", "boundary", "classes"]
IGNORE = -1


def n_outputs(target: Target, classes: int) -> int:
    """Maps that the model gives: 1 is sigmoid foreground, more are exclusive classes."""
    return {"foreground": 1, "boundary": 3}.get(target, classes)


def class_names(target: Target, classes: int) -> tuple[str, ...]:
    """What each score is of, background left out."""
    if target == "foreground":
        return ("foreground",)
    if target == "boundary":
        return ("interior", "boundary")
    return tuple(f"class {k}" for k in range(1, classes))


def to_plane(mask: np.ndarray, target: Target, classes: int, ignore: int | None) -> np.ndarray:
    """(h, w) int16 of a mask (h, w): 0 background; `IGNORE` for pixels of value ``ignore``.

    foreground : 1 where an object is. boundary : 1 inside an object, 2 on its outermost pixels where
    another object or the background begins. classes : the mask's own values. Raises InputError when
    a value is no class.
    """
    left_out = np.zeros(mask.shape, bool) if ignore is None else mask == ignore
    if target == "classes":
        plane = np.where(left_out, 0, mask)
        if plane.size and (plane.min() < 0 or plane.max() >= classes):
            raise InputError(
                f"a mask holds value {plane.max() if plane.max() >= classes else plane.min()}, classes are 0"
                f" to {classes - 1}; give --classes {int(plane.max()) + 1}, or --target foreground"
            )
        plane = plane.astype(np.int16)
    else:
        plane = (mask > 0).astype(np.int16)
        if target == "boundary":
            plane[outermost(mask)] = 2
    plane[left_out] = IGNORE
    return plane


def outermost(mask: np.ndarray) -> np.ndarray:
    """(h, w) bool: object pixels with a neighbour (4-connected) of another value."""
    edge = np.zeros(mask.shape, bool)
    below, right = mask[1:] != mask[:-1], mask[:, 1:] != mask[:, :-1]
    edge[1:] |= below
    edge[:-1] |= below
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    return edge & (mask > 0)
