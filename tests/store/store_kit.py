"""Small shards for the store's tests: a spec, rows that anyone can recompute, a whole run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raypipe.store import RowSource, ShardRun, ShardSpec, ShardWriter, open_for_writing

ROOT = Path(__file__).parents[2]


def make_spec(folder: Path, **changes: Any) -> ShardSpec:
    """A shard of 10 rows (3, 5) in cells of 4 unless told otherwise."""
    rows = changes.get("rows", 10)
    fields = {
        "path": Path(folder) / "dinov2_q_last" / "01" / "train.npy",
        "rows": rows,
        "row_shape": (3, 5),
        "dtype": "float32",
        "names": tuple(f"train-{row:04d}.png" for row in range(rows)),
        "grid": 4,
        "identity": {"backbone": "dinov2_q", "layer": -1, "weights": "00ff"},
        **changes,
    }
    return ShardSpec(**fields)


def rows_of(spec: ShardSpec, lo: int, hi: int) -> np.ndarray:
    """(hi - lo, *row_shape) float32, a function of the row alone."""
    return np.stack(
        [np.random.default_rng(row).normal(size=spec.row_shape) for row in range(lo, hi)]
    ).astype(np.float32)


def sources_of(lo: int, hi: int, bad: Sequence[int] = ()) -> list[RowSource]:
    return [
        RowSource(f"{row:032x}", row, "truncated" if row in bad else None) for row in range(lo, hi)
    ]


def fill(
    run: ShardRun,
    *,
    bad: Sequence[int] = (),
    writer: str = "w",
    done: Callable[[int, int], None] = lambda lo, hi: None,
) -> None:
    """Write and commit all that is missing, cell by cell."""
    with ShardWriter(run.target, writer) as out:
        for lo, hi in run.missing():
            out.write(lo, rows_of(run.spec, lo, hi), sources_of(lo, hi, bad))
            run.accept(out.commit())
            done(lo, hi)


def whole(spec: ShardSpec, *, bad: Sequence[int] = (), **options: Any) -> Path:
    """The sealed shard of ``spec``, made (or finished) in one run."""
    with open_for_writing(spec, run_id="test", **options) as run:
        if not run.sealed:
            fill(run, bad=bad)
        return run.seal()


def beside(spec: ShardSpec) -> list[str]:
    return sorted(path.name for path in spec.path.parent.iterdir())


SEALED_FILES = ["train.index.parquet", "train.manifest.json", "train.npy"]


def start(code: str, *args: object) -> subprocess.Popen[str]:
    """A Python process running ``code`` with this kit importable; its stdout is a pipe."""
    env = dict(os.environ, PYTHONPATH=f"{ROOT}:{Path(__file__).parent}", PYTHONUNBUFFERED="1")
    argv = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env)


def abandon(run: ShardRun) -> None:
    """What kill -9 does to a driver: its descriptors are closed, nothing else happens."""
    for held in (run._hold._lock, run._hold._fence):
        assert held is not None
        held.close()
    os.close(run._data)
