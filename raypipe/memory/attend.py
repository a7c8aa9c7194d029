"""A process under watch: its guard, and RUN/memory/NAME.csv, for the length of a block.

Every process of a run goes through here, the driver's too: who enforces the budget differs (the
node's memory actor for workers on Ray, the process itself elsewhere), what is recorded does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from raypipe.memory.config import ResolvedMemory
from raypipe.memory.guard import Guard, InProcessGuard, guarding
from raypipe.memory.tracker import MemoryTracker

FOLDER = "memory"
LOG_INTERVAL_S = 1.0


@contextmanager
def attend(
    memory: ResolvedMemory, run_dir: Path | None, name: str, guard: Guard | None = None
) -> Iterator[Guard]:
    """Watch this process as ``name``; without a ``guard`` it keeps its budget by itself.

    run_dir : where memory/NAME.csv is written; None writes nothing.
    """
    guard = guard or InProcessGuard(memory.config.budget_bytes, name)
    with ExitStack() as stack:
        log = None
        if run_dir is not None and memory.config.monitor_memory_usage:
            folder = run_dir / FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            tracker = MemoryTracker(
                folder / f"{name}.csv", LOG_INTERVAL_S, budget_bytes=guard.budget_bytes
            )
            log = stack.enter_context(tracker)
        yield stack.enter_context(guarding(guard, log))
