"""A slice without a step as a range of an axis. Pure."""

from __future__ import annotations

from raypipe.errors import ConfigError


def span(part: slice, size: int) -> tuple[int, int]:
    """``part`` of an axis of ``size`` as [lo, hi). Raises ConfigError for a step or an overrun.

    Unlike NumPy's, a range that leaves the axis is an error: a tile that was laid wrong is noticed.
    """
    lo = 0 if part.start is None else part.start
    hi = size if part.stop is None else part.stop
    if part.step not in (None, 1) or not 0 <= lo <= hi <= size:
        raise ConfigError(
            f"{part} asked of an axis of {size} pixels; give 0 <= start <= stop <= {size}, no step"
        )
    return int(lo), int(hi)
