"""What a failed training comes to: an error of raypipe's own ends it at once, as a worker does that
was ended for its memory where no smaller batch could help; all else is tried again.

The controller of Ray Train loads this module; it imports no torch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from ray.train import UserCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from raypipe.cluster.budget import VERDICT_LOOK_S, WorkerMemory, verdicts
from raypipe.errors import MemoryBudgetExceeded, RaypipeError, WorkerFailed
from raypipe.memory.verdict import Verdict

# A verdict is written right after the kill. One that a network disk shows later is found by the
# workers that begin anew, at the cost of their start.
VERDICT_WAIT_S = 0.5


def batch_limit(found: Sequence[Verdict]) -> int | None:
    """Half the batch at which a worker of this training was last ended for its memory, or None.

    Raises MemoryBudgetExceeded when that was one row, or when it had not come to its rows: the
    next one would end at the same place.
    """
    if not found:
        return None
    hopeless = next((verdict for verdict in found if verdict.batch in (None, 1)), None)
    if hopeless is not None:
        raise MemoryBudgetExceeded(hopeless.message())
    return min(verdict.batch or 1 for verdict in found) // 2


class NoSecondTry(UserCallback):
    """Ends training at the first error that another try would only repeat.

    What a callback raises in the controller is final; other failures are retried by Ray Train.
    memory, name : by which the verdicts on this training's workers are found.
    """

    def __init__(self, memory: WorkerMemory, name: str) -> None:
        self._memory, self._name = memory, name
        self._known = 0  # verdicts on those that died before

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        for rank in sorted(worker_exceptions):
            ours = _ours_within(worker_exceptions[rank])
            if ours is not None:
                raise ours
        if any(isinstance(e, WorkerHealthCheckFailedError) for e in worker_exceptions.values()):
            batch_limit(self._verdicts())

    def _verdicts(self) -> list[Verdict]:
        """On all who died, the one of this moment among them if it comes in time."""
        deadline = time.monotonic() + VERDICT_WAIT_S
        while len(found := self._read()) == self._known:
            if time.monotonic() > deadline:
                break
            time.sleep(VERDICT_LOOK_S)
        self._known = len(found)
        return found

    def _read(self) -> list[Verdict]:
        """None where the run's folder cannot be read now: the workers that begin anew look again."""
        try:
            return verdicts(self._memory, self._name)
        except OSError:
            return []


def _ours_within(error: BaseException | None) -> RaypipeError | None:
    """The raypipe error that Ray's wrappers hold, if there is one."""
    for _ in range(10):
        if error is None or isinstance(error, RaypipeError):
            return error
        inner = (getattr(error, "controller_failure", None), getattr(error, "cause", None))
        error = next(
            (e for e in (*inner, error.__cause__) if e is not None and e is not error), None
        )
    return None


def our_error(error: BaseException) -> BaseException:
    """The raypipe error inside Ray Train's, or WorkerFailed naming the first cause."""
    ours = _ours_within(error)
    if ours is not None:
        return ours
    failures = getattr(error, "worker_failures", None) or {}
    first = failures[min(failures)] if failures else error
    lines = [line.strip() for line in str(first).splitlines() if line.strip()]
    failed = WorkerFailed(
        "training failed for good, after every restart, last with: "
        f"{lines[-1] if lines else type(first).__name__}; its checkpoints are kept: mend the cause "
        "and run the same command again"
    )
    failed.__cause__ = error
    return failed
