"""Rows brought by a row server against rows mapped in place: batches of 16 x 962 x 768 float16.

    python benchmarks/remote_rows.py [--gb 1] [--rounds 5] [--object-store-gib 1]

Server and reader are on this one machine, the file is in the page cache, rows are in random order:
what is measured is the server's gather, the object store and the copy out of it, but no network.
The two ways take turns, each over the whole file, in the same process.

local_gbps      : `Gatherer` over the map, GB/s, median of the rounds
remote_gbps     : the same `Gatherer`, its rows from the server
remote_to_local : the median of the rounds' ratios
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from common import emit, median, parser, say
from stream_data import LARGE, check, make

from raypipe.cluster.remote_rows import RemoteRows
from raypipe.cluster.shards import Shards, open_shards
from raypipe.store import this_node
from raypipe.stream import ArraySource, Gatherer
from raypipe.stream.reading import OpenRows

WARM, CHECKED = 8, 3  # batches


def gbps(source: ArraySource, open_rows: OpenRows | None, seed: int) -> float:
    """Once over the file, after some batches that fill the ring and are held against the file."""
    order = np.random.default_rng(seed).permutation(source.n_rows)
    batches = [order[at : at + LARGE.batch] for at in range(0, source.n_rows, LARGE.batch)]
    with (
        Gatherer({"x": source}, LARGE.batch, open_rows=open_rows) as gatherer,
        closing(gatherer.batches([*batches[:WARM], *batches])) as stream,
    ):
        check((next(stream)["x"].numpy().copy() for _ in range(CHECKED)), source.path)
        for _ in range(WARM - CHECKED):
            next(stream)
        began = time.perf_counter()
        for _ in stream:
            pass
        return source.n_rows * source.row_bytes / (time.perf_counter() - began) / 1e9


def rates(shards: Shards, source: ArraySource, rounds: int) -> Iterator[tuple[float, float]]:
    """(local, remote) GB/s of each round; which comes first alternates."""
    brought = partial(shards.open_rows, turn=0, say=say)
    assert isinstance(brought(source), RemoteRows)
    ways: dict[str, tuple[ArraySource, OpenRows | None]] = {
        "local": (replace(source, node=""), None),
        "remote": (source, brought),
    }
    for turn in range(rounds):
        names = list(ways) if turn % 2 else list(ways)[::-1]
        seen = {name: gbps(*ways[name], seed=turn) for name in names}
        say(", ".join(f"{name} {rate:.2f} GB/s" for name, rate in seen.items()))
        yield seen["local"], seen["remote"]


def measure(path: Path, rounds: int) -> dict[str, Any]:
    source = replace(ArraySource.npy(path), node=this_node())
    options = {"batch_rows": LARGE.batch, "workers": 1, "memory": None, "say": say}
    with open_shards({"x": source}, **options) as shards:
        os.environ["RAYPIPE_NODE"] = "another-node"  # from here on the file is not this node's
        pairs = list(rates(shards, source, rounds))
        share = shards.shares[source]
    local, remote = zip(*pairs, strict=True)
    return {
        "local_gbps": median(local),
        "remote_gbps": median(remote),
        "remote_to_local": median([there / here for here, there in pairs]),
        "rows": source.n_rows,
        "rounds": rounds,
        "pieces_under_way": share.pieces,
        "piece_rows": share.piece_rows,
    }


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--gb", type=float, default=1.0, help="data, GB")
    args.add_argument("--rounds", type=int, default=5)
    args.add_argument("--object-store-gib", type=float, default=1.0)
    options = args.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    with tempfile.TemporaryDirectory() as tmp:
        path = make(Path(tmp) / "x.npy", LARGE, LARGE.count(options.gb))
        store_bytes = int(options.object_store_gib * 2**30)
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=store_bytes,
        )
        metrics = measure(path, options.rounds)
        ray.shutdown()
    emit("remote_rows", {**metrics, "object_store_bytes": store_bytes}, options.json)


if __name__ == "__main__":
    main()
