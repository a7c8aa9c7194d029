"""The look that is taken most often, compiled: anonymous pages of many processes, every tick.

Sixteen processes near their limits are read 3200 times a second. In the interpreter that took 2.3 %
of a core here, compiled 1.2 %, as much as in C; and it needs no GIL, so whatever else this process
does, nobody goes unwatched. What to look at and what follows from it is decided in ``watch``.

Importing this compiles it (half a second; the result is kept beside the file, or in the user's
cache) and loads numba: only the watch does, on a thread of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types

from raypipe.memory.watched import NEAR_TICKS

_CLOCK_MONOTONIC, _TIMER_ABSTIME, _EINTR, _NS = 1, 1, 4, 1_000_000_000

# Of the C library, by name: a ctypes function could not be kept in the cache.
_pread = types.ExternalFunction(
    "pread", types.intp(types.int32, types.uintp, types.uintp, types.int64)
)
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.uintp))
_clock_nanosleep = types.ExternalFunction(
    "clock_nanosleep", types.int32(types.int32, types.int32, types.uintp, types.uintp)
)


def _compiled(signature: str) -> Callable[[Callable[..., Any]], Any]:
    def compiled(function: Callable[..., Any]) -> Any:
        try:
            return njit(signature, nogil=True, cache=True)(function)
        except RuntimeError:  # no folder that a cache could be kept in
            return njit(signature, nogil=True)(function)

    return compiled


@_compiled("int64(int32, uint8[::1])")
def anon_pages(fd: int, text: np.ndarray) -> int:
    """Resident less shared pages by the statm ``fd``; 0 of an ended process, -1 unreadable.

    text : (128,) uint8, overwritten.
    """
    n = _pread(fd, text.ctypes.data, text.size, 0)
    field, value, resident = 0, 0, 0
    for i in range(n):
        letter = int(text[i])
        if 48 <= letter <= 57:
            value = value * 10 + letter - 48
            continue
        if field == 1:
            resident = value
        elif field == 2:
            return resident - value
        field, value = field + 1, 0
    return -1


@_compiled(
    "int64(int32[::1], int64[::1], int64[::1], int64[::1], int64[::1], uint8[::1], uint8[::1],"
    " int64, int64, int64)"
)
def stare(
    fds: np.ndarray,
    every: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    seen_ns: np.ndarray,
    left: np.ndarray,
    bell: np.ndarray,
    tick: int,
    poll_ns: int,
    most: int,
) -> int:
    """Look at each ``fds[i]`` at the ticks that ``every[i]`` divides, from ``tick`` on, until one
    has not ``low[i]`` to ``high[i] - 1`` pages, ``bell[0]`` is set, ``most`` ticks have passed, or
    the next look is more than ``NEAR_TICKS`` away. Returns the ticks that passed.

    Writes ``left[i]`` = 1 for those that left their range, for the others ``seen_ns[i]``, the
    monotonic clock at their last look. All arrays are (n,).
    """
    text, clock = np.empty(128, np.uint8), np.empty(2, np.int64)
    _clock_gettime(_CLOCK_MONOTONIC, clock.ctypes.data)
    wake, passed, found = clock[0] * _NS + clock[1], 0, False
    while passed < most and not found and not bell[0]:
        stride = most - passed
        for i in range(fds.size):
            stride = min(stride, every[i] - (tick + passed) % every[i])
        if stride > NEAR_TICKS:
            break
        wake += stride * poll_ns
        clock[0], clock[1] = wake // _NS, wake % _NS
        while _clock_nanosleep(_CLOCK_MONOTONIC, _TIMER_ABSTIME, clock.ctypes.data, 0) == _EINTR:
            pass
        passed += stride
        _clock_gettime(_CLOCK_MONOTONIC, clock.ctypes.data)
        now = clock[0] * _NS + clock[1]
        if now > wake + poll_ns:  # woken late: looks that were missed are not made up for
            wake = now
        for i in range(fds.size):
            if (tick + passed) % every[i] == 0:
                pages = anon_pages(fds[i], text)
                if low[i] <= pages < high[i]:
                    seen_ns[i] = now
                else:
                    left[i], found = 1, True
    return passed
