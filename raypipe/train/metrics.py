"""metrics.jsonl of a run: one JSON object a line, appended while training.

A step's line: kind "step", epoch, step, global_step, loss (the step's mean over all rows of all
workers), lr, rows, seconds (of training, those before a resume included), and where they apply
grad_norm, scale, skipped, micro_batch (rows computed at once, where they had to become fewer). An
epoch's: kind "epoch", epoch, global_step, train_loss, the task's
metrics, best, seconds. Epochs and steps count from 0 here, from 1 where they are shown to people.

A checkpoint notes how long the file was; resuming cuts it back to there, so the file of a resumed
run has each step once.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends records to ``path``, after cutting it to ``length_bytes``; None writes nothing."""

    def __init__(self, path: Path | None, length_bytes: int) -> None:
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            if self._file.tell() > length_bytes:
                self._file.truncate(length_bytes)

    def append(self, record: dict[str, Any]) -> None:
        """Write one line; it is on its way to the disk when this returns, not yet there."""
        if self._file is not None:
            self._file.write(json.dumps(plain(record)).encode() + b"\n")
            self._file.flush()

    def sync(self) -> int:
        """Wait for the disk; the file's length in bytes."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` with None in place of NaN and infinity, which JSON does not have."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }
