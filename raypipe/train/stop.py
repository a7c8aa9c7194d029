"""Ctrl-C while training: the step is finished and saved, wherever the workers run.

The wish travels as a file in the run folder, which every worker sees, and rank 0 looks for it after
each step. Asking twice leaves at once; the last checkpoint is then what is kept. So does asking once
while workers elsewhere have not begun, or begin anew: there is no step to finish, and they may wait for
memory or a place for long.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from raypipe.errors import Interrupted
from raypipe.train.result import FitResult

_WISH, _STATE = ".stop", ".training"
_TRAINS = "training"
_SAID = (
    b"\nraypipe: stopping after this step, with a checkpoint; Ctrl-C again leaves at once and loses "
    b"what came after the last one\n"
)


def stop_wished(run_dir: Path) -> bool:
    """Whether somebody asked the fit in ``run_dir`` to stop."""
    return (run_dir / _WISH).exists()


def note_training(run_dir: Path, trains: bool) -> None:
    """The workers train from now on (rank 0), or wait (who starts them). The driver made the file: a
    network disk would show a new one late.
    """
    (run_dir / _STATE).write_text(_TRAINS if trains else "", encoding="utf-8")


def _trains(run_dir: Path) -> bool:
    try:
        return (run_dir / _STATE).read_text(encoding="utf-8") == _TRAINS
    except FileNotFoundError:
        return False


@contextmanager
def stop_on_interrupt(run_dir: Path, *, workers_wait: bool = False) -> Iterator[None]:
    """Turns the first SIGINT into a wish; the second raises KeyboardInterrupt, as ever.

    workers_wait : they say by `note_training` when they train; before that the first SIGINT leaves the
    block: Interrupted. Only the main thread can take signals: elsewhere this does nothing, nor where they
    are ignored.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    wish, state = run_dir / _WISH, run_dir / _STATE
    wish.unlink(missing_ok=True)  # of a driver that was killed
    if workers_wait:
        note_training(run_dir, False)
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # a shell's background job
    try:
        if ignored or threading.current_thread() is not threading.main_thread():
            yield
        else:
            with _listening(wish, lambda: workers_wait and not _trains(run_dir)):
                yield
    finally:
        wish.unlink(missing_ok=True)
        state.unlink(missing_ok=True)


@contextmanager
def _listening(wish: Path, waits: Callable[[], bool]) -> Iterator[None]:
    asked = False

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked or waits():
            raise KeyboardInterrupt
        asked = True
        wish.touch()
        os.write(2, _SAID)  # print is not safe here: it may have been interrupted itself

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if asked:
            raise
        raise Interrupted(
            f"stopped while it waited to train in {wish.parent}: no step was under way, and what it held is "
            "given back; the same command begins, or goes on from the last checkpoint"
        ) from None
    finally:
        signal.signal(signal.SIGINT, before)


def unless_stopping(run_dir: Path) -> None:
    """Raise Interrupted for workers that are to begin anew where somebody asked to stop meanwhile."""
    if stop_wished(run_dir):
        raise Interrupted(
            f"stopped before the workers of {run_dir} began anew; its last checkpoint is kept: the same "
            "command goes on from there"
        )


def unless_stopped(result: FitResult) -> FitResult:
    """``result`` of a fit that ran to its end; raises Interrupted for one that was stopped."""
    if result.stopped:
        raise Interrupted(
            f"stopped after {result.global_steps} steps, saved in {result.run_dir / 'last'}; the same "
            "command goes on from there"
        )
    return result
