"""What the parts of benchmarks/fmri.py share: a scratch folder, turns with their answers, comparisons.

Wherever two contenders answer the same question their answers are compared (`same`), and the benchmark
ends when they differ.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import median, say
from fmri_data import Size
from fmri_turn import MIB, Seen, take_turn

Metrics = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """root : a scratch folder with ``inputs``; voxels : of the whole brain, for cleaning."""

    root: Path
    size: Size
    rounds: int
    voxels: int
    permutations: int
    samples: tuple[int, ...]

    @property
    def inputs(self) -> Path:
        """Scans, masks, tables."""
        return self.root / "inputs"

    def roi(self, size: str, number: int = 0) -> Path:
        """The mask of one region."""
        return self.inputs / f"roi_{size}_{number}.nii.gz"

    def scan(self, name: str) -> dict[str, Any]:
        """What a contender is told of a scan."""
        return {
            "scan": self.inputs / f"{name}.nii.gz",
            "table": self.inputs / f"{name}.csv",
            "mask": self.inputs / "mask.nii.gz",
        }

    def fresh(self, name: str) -> Path:
        """An empty folder."""
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def take(self, contender: str, name: str, **spec: Any) -> tuple[Seen, np.ndarray]:
        """One turn and its answer."""
        answer = self.root / "answer.npy"
        seen = take_turn(contender, answer=answer, **spec)
        say(
            f"  {name}: {_time(seen.seconds)}, until its end {seen.whole_s:.2f} s, "
            f"{seen.anon_mib:.0f} MiB above {seen.base_bytes / MIB:.0f} of its imports"
        )
        return seen, np.load(answer)


def cached(bench: Bench, name: str) -> Path:
    """A cache that has the scan whole."""
    cache = bench.fresh("cache")
    spec = {**bench.scan(name), "roi": bench.roi("5k"), "cache": True, "cache_dir": cache}
    bench.take("our_first", f"cache of {name}", **spec)
    return cache


def heat(path: Path) -> None:
    """Read it into the page cache."""
    with path.open("rb") as file:
        while file.read(8 << 20):
            pass


def same(ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> None:
    """The same answer, to ``tolerance`` of its largest magnitude."""
    if ours.shape != theirs.shape:
        sys.exit(f"answers have shapes {ours.shape} and {theirs.shape}")
    scale = max(1.0, float(np.abs(theirs).max()))
    worst = float(np.abs(ours.astype(np.float64) - theirs).max()) / scale
    if not worst <= tolerance:
        sys.exit(f"answers differ by {worst:.2e} of {scale:.4g}, above {tolerance:g}")


def ratio(slow: list[Seen], quick: list[Seen]) -> float:
    return median([a.seconds / b.seconds for a, b in zip(slow, quick, strict=True)])


def to_double(seconds: dict[int, list[float]], n: int) -> float:
    return median([b / a for a, b in zip(seconds[n], seconds[2 * n], strict=True)])


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.2f} ms"
