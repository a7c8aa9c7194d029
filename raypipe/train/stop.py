"""Ctrl-C while training: the step is finished and saved, wherever the workers run.

The wish travels as a file in the run folder, which every worker sees, and rank 0 looks for it after
each step. Asking twice leaves at once; the last checkpoint is then what is kept.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from raypipe.errors import Interrupted
from raypipe.train.result import FitResult

_WISH = ".stop"
_SAID = (
    b"\nraypipe: stopping after this step, with a checkpoint; Ctrl-C again leaves at once and loses "
    b"what came after the last one\n"
)


def stop_wished(run_dir: Path) -> bool:
    """Whether somebody asked the fit in ``run_dir`` to stop."""
    return (run_dir / _WISH).exists()


@contextmanager
def stop_on_interrupt(run_dir: Path) -> Iterator[None]:
    """Turns the first SIGINT into a wish; the second raises KeyboardInterrupt, as ever.

    Only the main thread can take signals: elsewhere this does nothing, nor where they are ignored.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    wish = run_dir / _WISH
    wish.unlink(missing_ok=True)  # of a driver that was killed
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # a shell's background job
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        wish.touch()
        os.write(2, _SAID)  # print is not safe here: it may have been interrupted itself

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        wish.unlink(missing_ok=True)


def unless_stopped(result: FitResult) -> FitResult:
    """``result`` of a fit that ran to its end; raises Interrupted for one that was stopped."""
    if result.stopped:
        raise Interrupted(
            f"stopped after {result.global_steps} steps, saved in {result.run_dir / 'last'}; the same "
            "command goes on from there"
        )
    return result
