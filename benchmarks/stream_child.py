"""One contender's turn, in a process of its own: ``stream_child.py '{"contender": ..., ...}'``.

Tells its parent (`stream_turn`) on stdout where it stands, and waits there until the parent has
read its memory and processor time. Runs under the contender's interpreter; only ours need raypipe.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import stream_data
import stream_peers
from stream_peers import PEERS, Turn

TURN_S = 0.2  # about how long one turn beside the limit is
PAIRS = 15  # such turns at least: on a shared host one pair may be half of the next
SKIP = 8  # batches that a loader had ready after a halt: they are not counted


def mark(at: str, **facts: Any) -> None:
    """Tell the parent, and wait for its answer."""
    print("@@" + json.dumps({"at": at, **facts}), flush=True)
    if not sys.stdin.readline():
        raise SystemExit("the benchmark has ended")


def rate(batches: Iterator[Any], seconds: float) -> tuple[float, int]:
    """(GB/s, bytes) over so many seconds, without what was ready before."""
    for _ in range(SKIP):
        next(batches)
    done, began = 0, time.perf_counter()
    while (now := time.perf_counter()) - began < seconds:
        done += next(batches).nbytes
    return done / (now - began) / 1e9, done


def rate_of(batches: Iterator[Any], count: int) -> float:
    """GB/s of ``count`` batches, without what was ready before."""
    for _ in range(SKIP):
        next(batches)
    began = time.perf_counter()
    done = sum(next(batches).nbytes for _ in range(count))
    return done / (time.perf_counter() - began) / 1e9


def hot(turn: Turn, batches: Iterator[Any], ours: Any, seconds: float, warm: float) -> None:
    """Steady state: warm up, measure, compare with the file; ours beside the limit as well."""
    began = time.perf_counter()
    next(batches)
    mark("first", start_s=time.perf_counter() - began)
    until = time.perf_counter() + warm
    while time.perf_counter() < until:
        next(batches)
    mark("warmed")
    seen = ours.forget() if hasattr(ours, "forget") else 0
    gbps, done = rate(batches, seconds)
    facts: dict[str, Any] = {"gbps": gbps, "bytes": done + SKIP * turn.rows.batch_bytes}
    if hasattr(ours, "gaps_ms"):
        facts["gaps_ms"] = ours.gaps_ms(seen, ours.forget())
    mark("measured", **facts)
    if ours is not None:
        mark("paired", **beside_limit(turn, batches, ours, seconds), api=ours.api)
    stream_data.check(stream_peers.first_batches(batches, 3), turn.npy)


def beside_limit(turn: Turn, batches: Iterator[Any], ours: Any, seconds: float) -> dict[str, Any]:
    """Ours and the memory copy in short turns of as many bytes: noise disturbs both.

    The limit is the best of 1 to as many threads as ours gathers with, each measured in every turn;
    so is our loader with each of these numbers, beside its default.
    """
    import numpy as np
    from stream_ours import Memcpy, gather_threads

    threads = gather_threads()
    limit = Memcpy(turn.rows.batch_bytes, threads, turn.n * turn.rows.row_bytes)
    counts = range(1, threads + 1)
    others = {}
    if threads > 1 and hasattr(ours, "with_threads"):
        others = {ways: iter(ours.with_threads(ways)) for ways in counts}
    gbps, _ = rate(batches, TURN_S)
    count = max(SKIP, round(gbps * 1e9 * TURN_S / turn.rows.batch_bytes))
    copied, by_threads = ({ways: list[float]() for ways in given} for given in (counts, others))
    found = list[float]()
    for _ in range(max(PAIRS, round(seconds / TURN_S / (threads + 1)))):
        for ways, rates in copied.items():
            rates.append(limit.gbps(count, ways))
        found.append(rate_of(batches, count))
        for ways, loader in others.items():
            by_threads[ways].append(rate_of(loader, count))
    best = max(copied, key=lambda ways: np.median(copied[ways]))
    return {
        "limit_gbps": float(np.median(copied[best])),
        "gbps": float(np.median(found)),
        "to_limit": _ratio(found, copied[best]),
        "to_limit_by_threads": {k: _ratio(v, copied[best]) for k, v in by_threads.items()},
        "limit_cached_gbps": limit.gbps(count, best, cached=True),
        "limit_threads": best,
        "threads": threads,
    }


def _ratio(ours: list[float], limit: list[float]) -> float:
    """The median of what was measured in one turn."""
    return statistics.median(one / two for one, two in zip(ours, limit, strict=True))


def cold(turn: Turn, batches: Iterator[Any], seconds: float) -> None:
    """What is left of one epoch after its first batch: starting Ray is no matter of the disk."""
    began = time.perf_counter()
    left = turn.n * turn.rows.row_bytes - next(batches).nbytes
    mark("first", start_s=time.perf_counter() - began)
    done, began = 0, time.perf_counter()
    while done < left and time.perf_counter() - began < seconds:
        done += next(batches).nbytes
    mark("measured", gbps=done / (time.perf_counter() - began) / 1e9, bytes=done)


def main() -> None:
    spec = json.loads(sys.argv[1])
    name, do = spec["contender"], spec["do"]
    rows = stream_data.Rows(**{**spec["rows"], "row_shape": tuple(spec["rows"]["row_shape"])})
    turn = Turn(
        npy=Path(spec["npy"]),
        folder=Path(spec["folder"]),
        rows=rows,
        n=spec["n"],
        workers=spec["workers"],
        cold=do == "cold",
        seconds=spec["warm"] + 3 * spec["seconds"] + 5,
    )
    stream_peers.quiet()
    ours = None
    if name in PEERS:
        importlib.import_module("torch")
        importlib.import_module(PEERS[name].module)
        prepare = PEERS[name].prepare
        if do == "prepare" and prepare is not None:
            prepare(turn)
            return
        mark("imported")
        batches = PEERS[name].batches(turn)
    else:
        importlib.import_module("torch")
        if name == "ray":
            importlib.import_module("raypipe.cluster.datasets")
        from stream_ours import OURS

        mark("imported")
        ours = OURS[name](turn)
        batches = iter(ours)
    if do == "first":
        began = time.perf_counter()
        next(batches)
        mark("first", start_s=time.perf_counter() - began)
    elif do == "cold":
        cold(turn, batches, spec["seconds"])
    else:
        hot(turn, batches, ours, spec["seconds"], spec["warm"])
    mark("done")
    if hasattr(batches, "close"):
        batches.close()


if __name__ == "__main__":
    main()
