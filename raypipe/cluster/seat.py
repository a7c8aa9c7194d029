"""One actor of a pool as the driver sees it: what it holds, and what its calls come to.

A call gives its result, or one of three failures: the worker's own RaypipeError, an error that is
none of ours (``WorkerError``), or the worker's death (``Died``), of which the node's memory actor
may know why. What follows from each is decided in ``pool``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, OutOfMemoryError, RayError, RayTaskError

from raypipe.cluster.budget import WorkerMemory, verdicts
from raypipe.cluster.node_memory import verdict_of
from raypipe.errors import RaypipeError, WorkerFailed
from raypipe.memory.verdict import Verdict

# A verdict is flushed to the disk right after the kill; a slow disk gets this long.
VERDICT_WAIT_S = 2.0


class WorkerError(Exception):
    """An exception out of a worker that is none of ours: worth another try elsewhere."""


class Died(Exception):
    """A worker is gone. out_of_memory : Ray's memory monitor ended it, or its budget (verdict)."""

    def __init__(self, text: str, *, out_of_memory: bool, verdict: Verdict | None = None) -> None:
        super().__init__(text)
        self.out_of_memory, self.verdict = out_of_memory, verdict


@dataclass(eq=False)
class Seat:
    """One actor and what it holds.

    A seat is loading, then opening, then has a call under way or is idle. name : unlike any
    other's of any call, for verdicts. memory : what it was told of its budget, None without one.
    where : its first answer. ticket : what its worker's ``open`` gave, by which the driver can shut
    it out.
    """

    actor: Any
    name: str
    memory: WorkerMemory | None
    loading: Any | None
    where: Any = None
    pid: int = 0
    node: str = ""
    opening: Any | None = None
    ticket: Any | None = None
    call: Any | None = None
    current: Any | None = None
    reserved: Any | None = None
    unacked: dict[Any, Any] = field(default_factory=dict)

    def result(self, ref: Any) -> Any:
        """What a call of this actor gave.

        Raises the worker's own RaypipeError, WorkerError, Died; WorkerFailed: there is no place.
        """
        try:
            return ray.get(ref)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, RaypipeError):
                raise cause from None
            raise WorkerError(f"{type(cause).__name__}: {cause}") from error
        except ActorUnschedulableError as error:
            raise WorkerFailed(f"no place for a worker: {one_line(error)}") from error
        except RayError as error:  # the actor, its node, or an object on it is gone
            if isinstance(error, OutOfMemoryError):
                raise Died(one_line(error), out_of_memory=True) from error
            verdict = self._verdict()
            text = verdict.message() if verdict else one_line(error)
            raise Died(text, out_of_memory=verdict is not None, verdict=verdict) from error

    def _verdict(self) -> Verdict | None:
        """Why the node's memory actor ended that worker, if it did; it writes that after the kill.

        The actor is asked first: a network disk may show its file late.
        """
        deadline = time.monotonic() + VERDICT_WAIT_S
        while self.memory is not None:
            told = verdict_of(self.node, self.pid) if self.node else None
            if told is not None and told.label == self.name:
                return told
            found = verdicts(self.memory, self.name)
            if found:
                return found[-1]
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return None


def one_line(error: BaseException) -> str:
    """An error's kind and its first line; of a worker's own, the line says the kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, (WorkerError, Died)):
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
