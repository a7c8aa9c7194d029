"""How to read rows of a voxel-major file: long runs by preadv, scattered rows through a map. Pure.

Measured on a shared machine (int16 x 320, rows of 640 bytes; ms of one thread when the pages are
in memory, then wall ms when they are on the disk only):

    10,000 rows, each apart        preadv 11.0, map 1.7
     5,000 rows in runs of  3 KiB  preadv  2.3, map 0.6    cold 105, 380
    10,000 rows in runs of 13 KiB  preadv  1.8, map 0.9    cold 100, 246
    10,000 rows in runs of 63 KiB  preadv  1.4, map 0.9    cold  26, 239

A call costs about 1 us and reads no more than the run; a fault on a cold map reads around itself.
So runs are read by calls as soon as the calls no longer count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

#: Mean bytes of a run from which on preadv is used.
RUN_BYTES = 8 << 10


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadPlan:
    """What to read into rows [0, n) of a buffer, and how to give them out.

    rows    : (n,) ascending, each once
    starts  : (k + 1,) run i is rows[starts[i]:starts[i + 1]], consecutive in the file
    give_out: (m,) which of ``rows`` each row asked for is; None when they are the same
    """

    way: Literal["preadv", "memmap"]
    rows: np.ndarray
    starts: np.ndarray
    give_out: np.ndarray | None

    @property
    def n_runs(self) -> int:
        """Pieces that are apart in the file."""
        return self.starts.size - 1


def read_plan(
    rows: np.ndarray, row_bytes: int, *, run_bytes: int = RUN_BYTES, use_memmap: bool = True
) -> ReadPlan:
    """The plan for ``rows`` (m,) int64, in any order, repeats allowed."""
    give_out = None
    if rows.size > 1 and not (rows[1:] > rows[:-1]).all():
        rows, give_out = np.unique(rows, return_inverse=True)
    apart = np.flatnonzero(np.diff(rows) != 1) + 1
    starts = np.concatenate(([0], apart, [rows.size])) if rows.size else np.zeros(1, np.int64)
    runs = max(1, starts.size - 1)
    scattered = rows.size * row_bytes < runs * run_bytes
    way: Literal["preadv", "memmap"] = "memmap" if scattered and use_memmap else "preadv"
    return ReadPlan(way=way, rows=rows, starts=starts, give_out=give_out)
