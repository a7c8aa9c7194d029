"""The cold passes of benchmarks/stream.py: files that were dropped from the page cache before.

``cold_pass`` takes every contender once on the largest rows; ``cold_windows`` takes our own loader in
the global order and by windows, by turns, on any rows, and says how far such an order is from a global one.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import median, say
from stream_data import Rows, chill, make, resident_fraction
from stream_peers import PEERS

from raypipe.stream import WindowShuffle, shuffle_quality

if TYPE_CHECKING:
    from stream import Table
    from stream_turn import Seen

OURS, ORDERS = ("plain", "ray"), ("plain", "plain_window")
COLD_S = 10.0  # of one contender
WINDOW_S = 5.0  # of our loader in one order
ONE_ROUND_BYTES = 1e9  # larger files are read in one round, others in two
START_S = 3.0  # about what a turn takes before it reads
MAKE_BYTES_S = 200e6  # about what small rows are written at
Metrics = dict[str, Any]


def cold_pass(table: Table) -> Metrics:
    """Every contender once."""
    made: Metrics = {}
    left = []
    for name in [*OURS, *table.workers]:
        own = table.folder / name if name not in OURS and PEERS[name].prepare else table.npy
        left.append(_chilled(own))
        if name not in table.failed and (seen := table.take(name, do="cold", seconds=COLD_S)):
            key = f"cold_{name}_gbps" if name in OURS else f"cold_peer_{name}_gbps"
            made[key] = seen.gbps
    made["cold_pages_left"] = max(left)
    return made


def cold_windows(table: Table, until: float) -> Metrics:
    """Our loader in both orders; keys end in the rows' suffix. Nothing is begun that would not end
    ``until`` then (monotonic seconds).
    """
    rows, n = table.rows, table.n * table.rows.cold_times
    found = _window_rounds(table, n, until)
    made: Metrics = {}
    for name in ORDERS:
        made[f"{name}_cold_gbps"] = _median([_from_the_start(one[name], rows) for one in found])
        parts = [_bytes(one[name], rows) / (n * rows.row_bytes) for one in found]
        made[f"{name}_cold_part"] = _median(parts)
    ratios = [
        _from_the_start(one[ORDERS[1]], rows) / _from_the_start(one[ORDERS[0]], rows)
        for one in found
    ]
    made |= {"plain_window_to_plain_cold": _median(ratios), "cold_window_rounds_done": len(found)}
    made |= {"cold_window_gb": n * rows.row_bytes / 1e9, **_quality(n, rows.window)}
    say(f"  cold, {rows.name}: {made}")
    return {f"{key}{rows.suffix}": value for key, value in made.items()}


def _window_rounds(table: Table, n: int, until: float) -> list[dict[str, Seen]]:
    """Both orders' turns, of each round that there was time for."""
    found: list[dict[str, Seen]] = []
    npy, make_s = table.npy, 0.0
    if n != table.n:
        npy, make_s = table.folder / "cold.npy", n * table.rows.row_bytes / MAKE_BYTES_S
    for turn in range(1 if n * table.rows.row_bytes > ONE_ROUND_BYTES else 2):
        if time.monotonic() + make_s + len(ORDERS) * (WINDOW_S + START_S) > until:
            say(f"  no time for the cold windows' round {turn + 1}")
            break
        if make_s:
            make(npy, table.rows, n)
            make_s = 0.0
        seen = {}
        for name in ORDERS if turn % 2 == 0 else reversed(ORDERS):
            _chilled(npy)
            if one := table.take(name, npy, n, do="cold", seconds=WINDOW_S):
                seen[name] = one
        if len(seen) == len(ORDERS):
            found.append(seen)
    return found


def _quality(n: int, window: int) -> Metrics:
    """What such an order costs, of one epoch of these rows."""
    quality = shuffle_quality(WindowShuffle(n, window, (0, 0))(np.arange(n)))
    return {
        "window_rows": window,
        "window_displacement": quality.displacement,
        "window_neighbour_correlation": quality.neighbour_correlation,
    }


def _from_the_start(seen: Seen, rows: Rows) -> float:
    """GB/s with the first batch: a window is asked for while that is awaited."""
    after = seen.marks["measured"]
    seconds = seen.marks["first"]["start_s"] + after["bytes"] / (after["gbps"] * 1e9)
    return _bytes(seen, rows) / seconds / 1e9


def _bytes(seen: Seen, rows: Rows) -> float:
    return float(seen.marks["measured"]["bytes"]) + rows.batch_bytes


def _chilled(path: Path) -> float:
    """The part of it that the kernel kept all the same."""
    chill(path)
    left = resident_fraction(path)
    if left > 0.01:
        say(f"cold pass: the file system kept {left:.0%} of {path.name}'s pages")
    return left


def _median(figures: list[float]) -> float | None:
    return median(figures) if figures else None
