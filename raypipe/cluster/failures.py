"""What a failed training comes to: raypipe's own error ends it at once, any other is tried again.

The controller of Ray Train loads this module before it starts a worker: it imports no torch.
"""

from __future__ import annotations

from ray.train import UserCallback

from raypipe.errors import RaypipeError, WorkerFailed


class NoSecondTry(UserCallback):
    """Ends training at the first error that raypipe raised itself: another try would end alike.

    What a callback raises in the controller is final; other failures are retried by Ray Train.
    """

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        for rank in sorted(worker_exceptions):
            ours = _ours_within(worker_exceptions[rank])
            if ours is not None:
                raise ours


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
