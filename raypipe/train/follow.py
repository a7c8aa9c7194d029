"""What a training run says of itself, told by another process: its log and its progress.

Rank 0 writes metrics.jsonl and train.log in the run folder, wherever it runs; a driver follows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from raypipe.progress import Progress

LOG_FILE = "train.log"


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

    def __exit__(self, *details: object) -> None:
        self.tick()
        if self._bar is not None:
            self._bar.__exit__(*details)

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


def log_aloud(run_dir: Path, tick: Callable[[], None]) -> Callable[[str], None]:
    """As `log_to`, and shown at once by ``tick``: where no step comes by that would show it."""
    log = log_to(run_dir)

    def say(text: str) -> None:
        log(text)
        tick()

    return say


def _epoch_line(record: dict[str, Any]) -> str:
    """``epoch 3: train_loss 1.51, val_loss 1.62 (best)``."""
    named = ("train_loss", "val_loss", "val_r", "val_dice")
    values = [f"{key} {record[key]:.4f}" for key in named if record.get(key) is not None]
    return f"epoch {record['epoch'] + 1}: {', '.join(values)}{' (best)' if record['best'] else ''}"
