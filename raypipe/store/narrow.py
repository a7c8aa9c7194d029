"""float32 -> float16 or bfloat16, round to nearest even, with the error that it makes measured.

Works chunk by chunk in fixed scratch of a few hundred KiB (it stays in a core's cache), so a
writer's memory does not depend on the batch. Overflow is an error, never a silent inf.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raypipe.errors import StoreError

#: Elements a chunk: 256 KiB of float32.
CHUNK = 1 << 16

#: Name -> (largest relative error of a normal number, smallest normal number, largest number).
_LIMITS = {
    "float16": (2.0**-11, 2.0**-14, 65504.0),
    "bfloat16": (2.0**-8, 2.0**-126, 3.3895313892515355e38),
}


@dataclass(frozen=True)
class NarrowingError:
    """Largest errors made; relative ones are over elements that are not 0.

    ``relative`` counts every element, so one tiny value that became 0 makes it 1.
    ``relative_normal`` leaves out values below the narrow format's normal range (under 6.1e-5 in
    float16) where they err by more than rounding; ``absolute`` is in the features' own unit.
    """

    relative: float = 0.0
    relative_normal: float = 0.0
    absolute: float = 0.0

    def merge(self, other: NarrowingError) -> NarrowingError:
        """The larger of each."""
        return NarrowingError(
            max(self.relative, other.relative),
            max(self.relative_normal, other.relative_normal),
            max(self.absolute, other.absolute),
        )


class Narrower:
    """Narrows chunks of up to `CHUNK` float32 values to ``dtype``, reusing its scratch."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype
        self.round_off, self.smallest_normal, self.largest = _LIMITS[dtype]
        self._narrow = np.empty(CHUNK, "<f2" if dtype == "float16" else "<u2")
        self._error = np.empty(CHUNK, "<f4")
        self._size = np.empty(CHUNK, "<f4")

    def __call__(self, values: np.ndarray) -> tuple[np.ndarray, NarrowingError]:
        """``values`` (n,) finite float32, n <= CHUNK -> narrowed (n,), valid until the next call.

        Raises StoreError when a value is beyond the largest that ``dtype`` holds.
        """
        n = len(values)
        narrow, error, size = self._narrow[:n], self._error[:n], self._size[:n]
        with np.errstate(all="ignore"):
            if self.dtype == "float16":
                np.copyto(narrow, values, casting="same_kind")
                np.copyto(error, narrow)
            else:
                to_bfloat16(values, out=narrow)
                error[:] = from_bfloat16(narrow)
            np.subtract(error, values, out=error)
            np.abs(error, out=error)
            absolute = float(error.max())
            np.abs(values, out=size)
            if not np.isfinite(absolute):
                raise StoreError(
                    f"value {float(size.max()):.6g} is beyond {self.dtype}'s largest "
                    f"{self.largest:.6g}; store bfloat16 or float32 instead"
                )
            np.divide(error, size, out=error, where=size > 0)
        relative = float(error.max())
        normal = relative
        if relative > self.round_off:  # only values below the normal range err by more
            normal = float(error.max(where=size >= self.smallest_normal, initial=0.0))
        return narrow, NarrowingError(relative, normal, absolute)


def to_bfloat16(values: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """float32 -> bfloat16 bits as uint16, round to nearest even; NaN stays a quiet NaN."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> np.uint32(16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if is_nan.any():  # rounding could carry a NaN's bits over into inf or -0
        rounded = np.where(is_nan, (bits >> np.uint32(16)) | np.uint32(0x0040), rounded)
    if out is None:
        return rounded.astype("<u2")
    np.copyto(out, rounded, casting="unsafe")
    return out


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) -> float32, exactly."""
    return (np.asarray(bits).astype("<u4") << np.uint32(16)).view("<f4")
