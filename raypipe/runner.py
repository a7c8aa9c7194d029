"""What a runner does, in two verbs, and the one that needs no cluster.

``map``: a worker loads once (its backbone, its open files), then is called per work item.
``fit``: one training task on one or several processes; both runners feed ``train.loop``.
Ray's runner is in ``raypipe.cluster``; rooms see only the protocol here.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from raypipe.errors import ConfigError, DeviceUnavailable
from raypipe.memory.attend import attend
from raypipe.memory.config import ResolvedMemory, resolve
from raypipe.memory.guard import note

if TYPE_CHECKING:
    from raypipe.stream import Cursor, StepSlice
    from raypipe.stream.reading import OpenRows, Source
    from raypipe.train import FitResult, Task, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What one pool of workers takes.

    workers : actors (one a GPU on CUDA); cpus : per worker, may be a fraction; run_dir : the run's
    folder, where each worker's memory is recorded; stands_for : workers of a run that this pool
    tries out, which share a node's memory as those will.
    """

    workers: int = 1
    device: str = "cpu"
    cpus: float = 1.0
    run_dir: Path | None = None
    stands_for: int | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"workers {self.workers} is below 1; give --workers 1 or more")


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Where workers may run.

    nodes : (machine, cores) of each node; several nodes of Ray may be one machine, which has its memory
    once. grows : more nodes may come when they are asked for.
    """

    nodes: tuple[tuple[str, int], ...]
    grows: bool = False

    def places(self, cores: float) -> int:
        """How many workers of ``cores`` there is room for now."""
        return sum(self._by_machine(cores).values())

    def together(self, workers: int, cores: float) -> int:
        """How many of ``workers`` may meet on one machine, and share its memory: Ray packs them."""
        return min(workers, max(self._by_machine(cores).values(), default=0) or workers)

    def cores_for(self, workers: int) -> float:
        """Cores that each of ``workers`` can have: as many as leave room for all of them.

        Below 1 where they are more than the cores there are, and no node will come.
        """
        largest = max((cores for _, cores in self.nodes), default=1)
        for cores in range(largest, 0, -1):
            if self.places(cores) >= workers:
                return float(cores)
        return 1.0 if self.grows else max(1, largest) / workers

    def _by_machine(self, cores: float) -> Counter[str]:
        found: Counter[str] = Counter()
        for machine, has in self.nodes:
            found[machine] += int(has / cores + 1e-6)
        return found


@dataclass(frozen=True, kw_only=True)
class Prospect:
    """What a run on Ray would have, for a dry run that starts no Ray."""

    memory: ResolvedMemory
    machines: Machines
    name: str = "ray"


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

    def at_most(self, other: Any) -> Item:
        """The same work, with no more memory at once than ``other`` takes."""
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
    """Runs compute: here, or on a cluster. memory : the budgets of its processes."""

    name: str
    memory: ResolvedMemory

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

    def reading(
        self, sources: Mapping[str, Source], batch_rows: int
    ) -> AbstractContextManager[OpenRows]:
        """How this process itself opens ``sources``, wherever their rows lie, for the block: to look
        at some, ``batch_rows`` at once at most, before it plans a fit.
        """
        ...

    def resolve_device(self, device: str) -> str: ...

    def needs(self, workers: int | None, device: str) -> Needs: ...

    @property
    def machines(self) -> Machines: ...

    def facts(self) -> list[tuple[str, str]]:
        """What it runs on, in words, for ``raypipe doctor``."""
        ...


class LocalRunner:
    """Everything in this process, serially: for debugging, for tests, for machines without Ray."""

    name = "local"

    def __init__(self, memory: ResolvedMemory | None = None) -> None:
        self.memory = memory or resolve()

    def pool(self, worker: Callable[[], StepWorker], needs: Needs) -> LocalPool:
        """One worker in this process, whatever ``needs`` says."""
        return LocalPool(worker, self.memory, needs.run_dir)

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
        """Train in this process. Raises ConfigError for more than one worker, Interrupted, and
        StoreError when rows lie on other nodes' disks only, before anything is written.
        """
        from raypipe.stream.at_hand import ways_at_hand
        from raypipe.train import WorkerContext, checkpoint, fit, training_plan
        from raypipe.train.follow import TrainProgress, log_aloud
        from raypipe.train.stop import stop_on_interrupt, stop_wished, unless_stopped

        if workers != 1:
            raise ConfigError(
                f"--workers {workers} needs --runner ray; --runner local trains in one"
            )
        run_dir = run_dir.resolve()
        ways = ways_at_hand(task.sources())
        if not resume:
            checkpoint.discard(run_dir)
        plan = training_plan(task.train_rows, cfg, 1, run_dir)
        progress = TrainProgress(plan.steps_per_epoch * plan.epochs, run_dir)
        ctx = WorkerContext(
            device=self.resolve_device(device),
            run_dir=run_dir,
            should_stop=lambda: stop_wished(run_dir),
            on_step=lambda _: progress.tick(),
            say=log_aloud(run_dir, progress.tick),
        )

        def slices(start: Cursor) -> Iterator[StepSlice]:
            return plan.slices(0, 1, start)

        with attend(self.memory, run_dir, "train"), progress, stop_on_interrupt(run_dir):
            if ways:
                run_dir.mkdir(parents=True, exist_ok=True)
                ctx.say(f"read {ways}")
            return unless_stopped(fit(task, cfg, ctx, slices))

    def reading(
        self, sources: Mapping[str, Source], batch_rows: int
    ) -> AbstractContextManager[OpenRows]:
        """What is at hand here, and nothing else."""
        from raypipe.stream.at_hand import open_at_hand

        return nullcontext(open_at_hand)

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

    @property
    def machines(self) -> Machines:
        """Room for one worker, this process."""
        return Machines(nodes=(("", 1),))

    def facts(self) -> list[tuple[str, str]]:
        """This process."""
        return [("runs in", f"this process, with {os.cpu_count()} cores; no Ray")]


class LocalPool:
    """A pool of one worker, in this process, which keeps its budget itself."""

    def __init__(
        self,
        worker: Callable[[], StepWorker],
        memory: ResolvedMemory | None = None,
        run_dir: Path | None = None,
    ) -> None:
        self._make, self._memory, self._run_dir = worker, memory or resolve(), run_dir
        self._worker: StepWorker | None = None
        self._held = ExitStack()

    def __enter__(self) -> LocalPool:
        with ExitStack() as stack:
            stack.enter_context(attend(self._memory, self._run_dir, "worker"))
            note(phase="load")
            self._worker = self._make()
            self._held = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._held:
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
