"""What a runner does, in two verbs, and the one that needs no cluster.

``map``: a worker loads once (its backbone, its open files), then is called per work item.
``fit``: one training task on one or several processes; both runners feed ``train.loop``.
Ray's runner is in ``raypipe.cluster``; rooms see only the protocol here.
"""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from raypipe.errors import ConfigError, DeviceUnavailable
from raypipe.progress import Progress

if TYPE_CHECKING:
    from raypipe.stream import Cursor, StepSlice
    from raypipe.train import FitResult, Task, TrainConfig


LOG_FILE = "train.log"


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What one pool of workers takes.

    workers : actors (one a GPU on CUDA); cpus : per worker, may be a fraction.
    """

    workers: int = 1
    device: str = "cpu"
    cpus: float = 1.0

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"workers {self.workers} is below 1; give --workers 1 or more")


@dataclass(frozen=True)
class Done:
    """One finished, durable work item: its key, and what the worker says of it."""

    key: Any
    payload: Any = None


class Item(Protocol):
    """A unit of work, told apart by its key."""

    @property
    def key(self) -> Any: ...

    def again(self) -> Item:
        """The same work, handed out once more after its worker failed."""
        ...

    def with_less_memory(self) -> Item:
        """As ``again``, for a worker that was ended for the memory it took.

        Raises MemoryBudgetExceeded when it cannot be done with less.
        """
        ...


class StepWorker(Protocol):
    """A worker that overlaps items: it may report an item as done in a later call.

    ``open(shared)`` comes first, also to a worker that replaces a dead one; what it returns is the
    driver's ticket to shut this worker out.
    """

    def describe(self) -> Any: ...

    def open(self, shared: Any) -> Any: ...

    def step(self, item: Any, upcoming: Any | None) -> list[Done]: ...

    def drain(self) -> list[Done]: ...

    def close(self) -> None: ...


class Pool(Protocol):
    """Workers that have loaded; see ``Runner.pool``."""

    def describe(self) -> Any: ...

    def run(
        self, items: Sequence[Any], shared: Any, lost: Callable[[Any], None] = ...
    ) -> Iterator[Done]: ...


class Runner(Protocol):
    """Runs compute: here, or on a cluster."""

    name: str

    def pool(
        self, worker: Callable[[], StepWorker], needs: Needs
    ) -> AbstractContextManager[Pool]: ...

    def fit(
        self,
        task: Task,
        cfg: TrainConfig,
        run_dir: Path,
        *,
        workers: int = 1,
        device: str = "auto",
        resume: bool = True,
    ) -> FitResult: ...

    def resolve_device(self, device: str) -> str: ...

    def needs(self, workers: int | None, device: str) -> Needs: ...


class LocalRunner:
    """Everything in this process, serially: for debugging, for tests, for machines without Ray."""

    name = "local"

    def pool(self, worker: Callable[[], StepWorker], needs: Needs) -> LocalPool:
        """One worker in this process, whatever ``needs`` says."""
        return LocalPool(worker)

    def fit(
        self,
        task: Task,
        cfg: TrainConfig,
        run_dir: Path,
        *,
        workers: int = 1,
        device: str = "auto",
        resume: bool = True,
    ) -> FitResult:
        """Train in this process. Raises ConfigError for more than one worker, Interrupted."""
        from raypipe.train import WorkerContext, checkpoint, fit, training_plan
        from raypipe.train.stop import stop_on_interrupt, stop_wished, unless_stopped

        if workers != 1:
            raise ConfigError(
                f"--workers {workers} needs --runner ray; --runner local trains in one"
            )
        run_dir = run_dir.resolve()
        if not resume:
            checkpoint.discard(run_dir)
        plan = training_plan(task.train_rows, cfg, 1, run_dir)
        progress = TrainProgress(plan.steps_per_epoch * plan.epochs, run_dir)
        ctx = WorkerContext(
            device=self.resolve_device(device),
            run_dir=run_dir,
            should_stop=lambda: stop_wished(run_dir),
            on_step=lambda _: progress.tick(),
            say=log_to(run_dir),
        )

        def slices(start: Cursor) -> Iterator[StepSlice]:
            return plan.slices(0, 1, start)

        with progress, stop_on_interrupt(run_dir):
            return unless_stopped(fit(task, cfg, ctx, slices))

    def resolve_device(self, device: str) -> str:
        """``auto`` -> cuda where there is one; raises DeviceUnavailable for a missing cuda."""
        import torch

        if device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise DeviceUnavailable(
                "--device cuda: torch finds no GPU here; give --device cpu (or auto), or check "
                "nvidia-smi and that torch is a CUDA build"
            )
        return device

    def needs(self, workers: int | None, device: str) -> Needs:
        """One worker with every core; raises ConfigError for more."""
        if workers not in (None, 1):
            raise ConfigError(f"--workers {workers} needs --runner ray; --runner local has one")
        return Needs(workers=1, device=device, cpus=float(os.cpu_count() or 1))


class LocalPool:
    """A pool of one worker, in this process."""

    def __init__(self, worker: Callable[[], StepWorker]) -> None:
        self._make = worker
        self._worker: StepWorker | None = None

    def __enter__(self) -> LocalPool:
        self._worker = self._make()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._worker is not None:
            self._worker.close()
        self._worker = None

    def describe(self) -> Any:
        """What the loaded worker says of itself."""
        return self._loaded.describe()

    def run(
        self,
        items: Sequence[Any],
        shared: Any,
        lost: Callable[[Any], None] = lambda ticket: None,
    ) -> Iterator[Done]:
        """Work through ``items`` in order, yielding each as it becomes durable."""
        self._loaded.open(shared)
        queue = deque(items)
        while queue:
            item = queue.popleft()
            yield from self._loaded.step(item, queue[0] if queue else None)
        yield from self._loaded.drain()

    @property
    def _loaded(self) -> StepWorker:
        if self._worker is None:
            raise RuntimeError("a pool is used inside its with block")
        return self._worker


class TrainProgress:
    """Follows a run's metrics.jsonl and train.log, which rank 0 writes, wherever it runs.

    steps : optimiser steps of the whole run. The rate counts from the first step on, without
    start-up; what an earlier run wrote is not told again.
    """

    def __init__(self, steps: int, run_dir: Path) -> None:
        self._metrics, self._log = _Tail(run_dir / "metrics.jsonl"), _Tail(run_dir / LOG_FILE)
        self._steps = steps
        self._bar: Progress | None = None

    def __enter__(self) -> TrainProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.tick()
        if self._bar is not None:
            self._bar.__exit__(kind, error, trace)

    def tick(self) -> None:
        """Take in what was written since the last call."""
        for text in self._log.new_lines():
            print(text, file=sys.stderr, flush=True)
        for line in self._metrics.new_lines():
            with suppress(ValueError):  # half a line, when a resumed run cut the file between looks
                self._take(json.loads(line))

    def _take(self, record: dict[str, Any]) -> None:
        if record.get("kind") == "step":
            self._count(record["global_step"] + 1)
        elif record.get("kind") == "epoch" and self._bar is not None:
            self._bar.note(_epoch_line(record))

    def _count(self, step: int) -> None:
        if self._bar is None:
            self._bar = Progress("train", self._steps, "steps", done=step - 1)
            self._bar.__enter__()
        self._bar.update(max(0, step - self._bar.done))


class _Tail:
    """The lines that are added to a file from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = self._size()

    def new_lines(self) -> Iterator[str]:
        """Whole lines added since the last call."""
        # A resumed run first cuts off the steps that its checkpoint does not know.
        self._offset = min(self._offset, self._size())
        if not self._offset < self._size():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                yield line.decode(errors="replace").rstrip("\n")

    def _size(self) -> int:
        try:
            return self._path.stat().st_size
        except FileNotFoundError:
            return 0


def log_to(run_dir: Path) -> Callable[[str], None]:
    """Writes what training says to the run's train.log; a worker's own output goes nowhere."""

    def say(text: str) -> None:
        with (run_dir / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(text.rstrip("\n") + "\n")

    return say


def _epoch_line(record: dict[str, Any]) -> str:
    """``epoch 3: train_loss 1.51, val_loss 1.62 (best)``."""
    named = ("train_loss", "val_loss", "val_r")
    values = [f"{key} {record[key]:.4f}" for key in named if record.get(key) is not None]
    return f"epoch {record['epoch'] + 1}: {', '.join(values)}{' (best)' if record['best'] else ''}"
