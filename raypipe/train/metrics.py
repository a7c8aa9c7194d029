"""metrics.jsonl of a run: one JSON object a line, appended while training.

A step's line: kind "step", epoch, step, global_step, loss (the step's mean over all rows of all
workers), lr, rows, seconds (of training, those before a resume included), and where they apply
grad_norm, scale, skipped, micro_batch (rows computed at once, where they had to become fewer). An
epoch's: kind "epoch", epoch, global_step, train_loss, the task's
metrics, best, seconds. Epochs and steps count from 0 here, from 1 where they are shown to people.

A checkpoint notes how long the file was; resuming cuts it back to there, so the file of a resumed
run has each step once. One rank writes the file; another that has to save alone notes what it finds in
it, and its records that are not in it yet. On a network disk it may find less than was written: what lies
between that and its records stays.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
# A rank can be at most two steps ahead of what the one that writes has put on the disk.
_RECENT = 8
_LAST_LINES_BYTES = 1 << 20


class MetricsLog:
    """Appends records to ``path``, after cutting it to ``length_bytes``; None writes nothing.

    tail : records that a checkpoint had beside those bytes; the file is then cut before the first of them.
    """

    def __init__(
        self, path: Path | None, length_bytes: int, tail: Sequence[dict[str, Any]] = ()
    ) -> None:
        self._file = None
        self._recent: deque[dict[str, Any]] = deque(maxlen=_RECENT)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            if tail:
                length_bytes = _end_before(path, length_bytes, _place(tail[0]))
            if self._file.tell() > length_bytes:
                self._file.truncate(length_bytes)
        for record in tail:
            self.append(record)

    def append(self, record: dict[str, Any]) -> None:
        """Write one line; it is on its way to the disk when this returns, not yet there."""
        self._recent.append(plain(record))
        if self._file is not None:
            self._file.write(json.dumps(plain(record)).encode() + b"\n")
            self._file.flush()

    def sync(self) -> int:
        """Wait for the disk; the file's length in bytes."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def beside(self, path: Path) -> tuple[int, list[dict[str, Any]]]:
        """Of ``path``, which another rank writes: the length of its whole lines, and this rank's records
        that come after the last of them.
        """
        length, last = _last_line(path)
        missing = [r for r in self._recent if last is None or _place(r) > _place(last)]
        return length, missing

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _last_line(path: Path) -> tuple[int, dict[str, Any] | None]:
    """Bytes up to the end of the last whole line, and that line's record; (0, None) without any."""
    if not path.exists():
        return 0, None
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = file.seek(max(0, size - _LAST_LINES_BYTES))
        lines, _, _ = file.read(size - start).rpartition(b"\n")
    return (start + len(lines) + 1, json.loads(lines.rpartition(b"\n")[2])) if lines else (0, None)


def _end_before(path: Path, start_bytes: int, place: tuple[int, bool]) -> int:
    """Where the whole lines from ``start_bytes`` on end whose records come before ``place``."""
    end = start_bytes
    with path.open("rb") as file:
        file.seek(start_bytes)
        for line in file:
            if not line.endswith(b"\n") or not _is_before(line, place):
                break
            end += len(line)
    return end


def _is_before(line: bytes, place: tuple[int, bool]) -> bool:
    try:
        return _place(json.loads(line)) < place
    except ValueError:  # torn when its machine went down
        return False


def _place(record: dict[str, Any]) -> tuple[int, bool]:
    """Its place in the file: an epoch's line names the step that follows it."""
    return int(record["global_step"]), record["kind"] == "step"


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` with None in place of NaN and infinity, which JSON does not have."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }
