"""A worker's place among the others, and the few things workers say to each other.

The caller (a runner, Ray Train) starts the processes and, for more than one worker, initialises
``torch.distributed`` (gloo or nccl) before `raypipe.train.loop.fit`. With one worker none of it is
needed, and every exchange below is a no-op.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raypipe.errors import ConfigError
from raypipe.stream.reading import OpenRows


def _ignore(record: dict[str, Any]) -> None:
    """The default listener."""


def _never() -> bool:
    return False


def _say(text: str) -> None:
    print(text, flush=True)


@dataclass(frozen=True, kw_only=True)
class WorkerContext:
    """``rank`` of ``world`` workers, computing on ``device``, writing (rank 0) to ``run_dir``.

    ``run_dir`` must be visible to all workers: every one reads the checkpoint that it resumes from.
    ``report``: called on every rank at the end of each epoch, with the epoch's record and
    ``checkpoint`` (path of the one just written); it may be a barrier.
    ``should_stop``: asked on every rank after each step; one True stops all, with a checkpoint.
    ``on_step``: rank 0, each step's record (for a progress bar). ``say``: rank 0, text for people.
    ``clock``: seconds from any start, never backwards; rank 0's decides when a checkpoint is due.
    ``open_rows``: how this worker opens a source of rows; None: each opens itself.
    """

    run_dir: Path
    rank: int = 0
    world: int = 1
    device: str = "cpu"
    report: Callable[[dict[str, Any]], None] = _ignore
    should_stop: Callable[[], bool] = _never
    on_step: Callable[[dict[str, Any]], None] = _ignore
    say: Callable[[str], None] = _say
    clock: Callable[[], float] = time.monotonic
    open_rows: OpenRows | None = None

    def __post_init__(self) -> None:
        if self.world < 1 or not 0 <= self.rank < self.world:
            raise ConfigError(f"rank {self.rank} of {self.world} workers: ranks count from 0")

    @property
    def is_main(self) -> bool:
        """Whether this worker writes the run's files."""
        return self.rank == 0

    @property
    def torch_device(self) -> torch.device:
        """``device`` as torch's own type."""
        return torch.device(self.device)

    def check_group(self) -> None:
        """Raise ConfigError when the process group is not the one that rank and world describe."""
        if self.world == 1:
            return
        ready = dist.is_available() and dist.is_initialized()
        if not ready or (dist.get_rank(), dist.get_world_size()) != (self.rank, self.world):
            raise ConfigError(
                f"worker {self.rank} of {self.world} has no matching torch.distributed group; "
                "initialise it (gloo or nccl) before fit"
            )

    def add_up(self, tensor: Tensor) -> Tensor:
        """``tensor`` summed over the workers, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def smallest(self, number: int) -> int:
        """The smallest ``number`` of all workers, on every one."""
        if self.world == 1:
            return number
        box = torch.tensor(number, dtype=torch.int64, device=self.torch_device)
        dist.all_reduce(box, op=dist.ReduceOp.MIN)
        return int(box)

    def from_main(self, value: Any) -> Any:
        """Rank 0's ``value`` (a small picklable), on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self._object_device)
        return box[0]

    def collect(self, value: Any) -> list[Any]:
        """Every rank's ``value`` (a small picklable), in rank order, on every rank."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value)
        return gathered

    def on_main(self, act: Callable[[], Any]) -> Any:
        """``act()`` on rank 0; its result, or its error, on every rank.

        An error that only rank 0 saw (a full disk) would leave the others waiting in their next
        exchange until the group's timeout.
        """
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.is_main:
            try:
                outcome = (act(), None)
            except Exception as error:  # passed on to every rank, and raised there
                if self.world == 1:
                    raise
                outcome = (None, error)
        result, failure = self.from_main(outcome)
        if failure is not None:
            raise failure
        return result

    def together(self, act: Callable[[], Any]) -> Any:
        """This rank's ``act()``; when it fails on any rank, the error of the first that failed on every rank:
        with one of its own each might do something else next, and wait for the others there.
        """
        result, failure = None, None
        try:
            result = act()
        except Exception as error:  # told to every rank, and raised there
            if self.world == 1:
                raise
            failure = error
        failures = self.collect(failure)
        failures[self.rank] = failure  # a copy has no traceback
        for found in failures:
            if found is not None:
                raise found
        return result

    @property
    def _object_device(self) -> torch.device:
        return self.torch_device if dist.get_backend() == "nccl" else torch.device("cpu")
