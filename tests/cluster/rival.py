"""Another run's worker, which holds memory that others ask for, on this machine's node."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from raypipe.cluster.remote_guard import join
from raypipe.units import format_bytes

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests


class Rival:
    """Holds a lease; all of the node give out ``capacity_bytes`` together while it does."""

    def hold(self, run_dir: Path, n_bytes: int, capacity_bytes: int) -> int:
        self.guard = join(
            n_bytes,
            "another-worker",
            capacity_bytes=capacity_bytes,
            shared_by="this test",  # whatever other clusters of this machine hold
            verdict_dir=run_dir / "memory",
            wait_s=30,
        )
        return os.getpid()

    def end(self) -> None:
        self.guard.close()


@contextmanager
def rival(
    run_dir: Path, n_bytes: int = 1 << 30, capacity_bytes: int = 1200 << 20
) -> Iterator[tuple[str, Callable[[], None]]]:
    """In the block it holds its lease, of the run ``run_dir``: how others are told of it, as a regular
    expression; and what gives it back before the block's end.
    """
    actor = ray.remote(Rival).options(num_cpus=0).remote()
    pid = ray.get(actor.hold.remote(run_dir, n_bytes, capacity_bytes), timeout=60)
    size = re.escape(format_bytes(n_bytes))
    holds = rf"held by another-worker \({pid}\) {size} of {run_dir}"
    try:
        yield (
            rf"of \S+ \S+ are free; (before it comes? .*; )?{holds}",
            lambda: ray.get(actor.end.remote(), timeout=60),
        )
    finally:
        ray.get(actor.end.remote(), timeout=60)
        ray.kill(actor)
