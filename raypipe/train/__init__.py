"""Training: one loop for every task, on one worker or many, that stops and resumes anywhere.

``task`` says what a task must offer; ``config`` holds the options; ``context`` is the worker's
place among the others; ``loop.fit`` runs the steps that `raypipe.stream` planned; ``precision``
applies the techniques (channels_last, checkpointing, autocast, DDP) in one visible sequence;
``checkpoint`` writes what a run needs to go on. Who starts the workers: `raypipe.runner` and
`raypipe.cluster`.

Only the options load with this package; torch comes with `raypipe.train.loop` and its neighbours.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from raypipe.train.config import TrainConfig

if TYPE_CHECKING:
    from raypipe.train.checkpoint import load_model_state
    from raypipe.train.context import WorkerContext
    from raypipe.train.feed import training_plan
    from raypipe.train.loop import fit
    from raypipe.train.precision import settings_table
    from raypipe.train.result import FitResult, finished
    from raypipe.train.task import Batch, Task

_HOMES = {
    "Batch": "task",
    "FitResult": "result",
    "Task": "task",
    "WorkerContext": "context",
    "finished": "result",
    "fit": "loop",
    "load_model_state": "checkpoint",
    "settings_table": "precision",
    "training_plan": "feed",
}

__all__ = [
    "Batch",
    "FitResult",
    "Task",
    "TrainConfig",
    "WorkerContext",
    "finished",
    "fit",
    "load_model_state",
    "settings_table",
    "training_plan",
]


def __getattr__(name: str) -> Any:
    """Load the names that need torch when they are first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
