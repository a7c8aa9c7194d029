"""RUN/memory/NAME.csv: what one process held over time, with true peaks; survives kill -9.

A thread samples the charge twenty times a second, so that a peak between two rows is seen (a
hundred times cost a reader at memory speed some 3 % of its batches); a row is appended every
``log_interval`` seconds, by one write, to the kernel: a killed process loses at most its last
interval. A thread sees nothing while other code holds the GIL in one long call; the node's memory
actor, a process of its own, does. Read back by ``history``, drawn by ``figure``.
"""

from __future__ import annotations

import csv
import io
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raypipe.errors import ConfigError
from raypipe.memory.limits import available_bytes
from raypipe.memory.probe import Charge, GpuMemory, charge, gpu_memory, own_reading

COLUMNS = (
    "step", "time_s", "phase", "charge_bytes", "charge_peak_bytes", "rss_file_bytes",
    "available_bytes", "budget_bytes",
)  # fmt: skip
# A sample reads statm alone; pinned and shared bytes, which change in few large steps and cost as
# much again, are read every so many samples, at every update and for every row.
WHOLE_EVERY = 2
PHASE_ROW_S = 0.05  # phases that alternate faster share rows: a log is no trace
GPU_COLUMNS = ("allocated", "reserved", "peak")


@dataclass
class _Peak:
    """The largest charge so far, and where the work stood then."""

    charge_bytes: int = 0
    step: int | None = None
    phase: str = ""


class MemoryTracker:
    """Logs this process for the length of a block; ``update`` says what it is doing.

    log_file : the CSV; one that is there already is continued
    log_interval, sample_interval : seconds between rows, and between samples of the charge
    budget_bytes : written with every row, for the figure
    Raises ConfigError for an interval that is not above 0.
    """

    def __init__(
        self,
        log_file: Path | str,
        log_interval: float = 1.0,
        *,
        budget_bytes: int | None = None,
        sample_interval: float = 0.05,
    ) -> None:
        for name, value in (("log_interval", log_interval), ("sample_interval", sample_interval)):
            if not value > 0:
                raise ConfigError(f"{name} {value} must be above 0 seconds; give e.g. 1.0")
        self.log_file = Path(log_file)
        self.log_interval, self.sample_interval = log_interval, sample_interval
        self.budget_bytes = budget_bytes
        self._fd = -1
        self._lock = threading.Lock()
        self._running = threading.Lock()  # held while the thread runs: a cheaper Event
        self._thread: threading.Thread | None = None
        self._step: int | None = None
        self._phase = ""
        self._peak, self._interval_peak_bytes, self._samples = _Peak(), 0, 0
        self._file_peak_bytes = 0
        self._least_available: int | None = None
        self._gpus: tuple[GpuMemory, ...] = ()
        self._gpu_peaks: dict[int, int] = {}
        self._n_gpus, self._last_row = 0, 0.0
        self._last = Charge(0, 0, 0, 0)

    def __enter__(self) -> MemoryTracker:
        self._n_gpus = len(gpu_memory())
        self._fd = self._open()
        self._row(self._sample())
        self._running.acquire()
        self._thread = threading.Thread(target=self._run, name="raypipe-memory-log", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.release()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            self._row(self._sample())
            self._close()

    def update(self, step: int | None = None, phase: str | None = None) -> None:
        """Say where the work stands. A new phase ends the row of the last and is a sample; a new
        step alone costs a microsecond, the thread samples all the while.
        """
        with self._lock:
            if phase is not None and phase != self._phase:
                now, at = self._sample(), time.monotonic()
                if at >= min(self._next_row, self._last_row + PHASE_ROW_S):
                    self._row(now)  # what was held until here belongs to the phase that ends
            self._step = self._step if step is None else step
            self._phase = self._phase if phase is None else phase

    def get_max_usage(self) -> dict[str, Any]:
        """Peaks since the block began, as JSON types; None where nothing was seen yet."""
        with self._lock:
            return {
                "charge_bytes": self._peak.charge_bytes,
                "step": self._peak.step,
                "phase": self._peak.phase,
                "rss_file_bytes": self._file_peak_bytes,
                "least_available_bytes": self._least_available,
                "budget_bytes": self.budget_bytes,
                "samples": self._samples,
                "gpus": [
                    {"index": gpu.index, "name": gpu.name, "total_bytes": gpu.total_bytes,
                     "peak_allocated_bytes": self._gpu_peaks.get(gpu.index, 0)}
                    for gpu in self._gpus
                ],
            }  # fmt: skip

    def plot_history(self, output_file: Path | str) -> Path:
        """Draw the log against its budget as PNG (or by the name's ending, .svg, .pdf)."""
        from raypipe.memory.figure import memory_figure
        from raypipe.memory.history import read_history

        path = Path(output_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        memory_figure([read_history(self.log_file)]).savefig(path, dpi=150, facecolor="white")
        return path

    @property
    def _next_row(self) -> float:
        return self._last_row + self.log_interval

    # ---- the thread's side

    def _run(self) -> None:
        while not self._running.acquire(timeout=self.sample_interval):
            with self._lock:
                due = time.monotonic() >= self._next_row
                now = self._sample(whole=due or self._samples % WHOLE_EVERY == 0)
                if due:
                    self._row(now)
        self._running.release()

    def _sample(self, *, whole: bool = True) -> Charge:
        if whole:
            now = charge()
        else:
            anon, file = own_reading()
            now = self._last._replace(anon_bytes=anon, file_bytes=file)
        self._last = now
        total = now.total_bytes
        self._samples += 1
        self._interval_peak_bytes = max(self._interval_peak_bytes, total)
        self._file_peak_bytes = max(self._file_peak_bytes, now.file_bytes)
        if total > self._peak.charge_bytes:
            self._peak = _Peak(total, self._step, self._phase)
        return now

    # ---- the file

    def _open(self) -> int:
        header = _line([*COLUMNS, *self._gpu_columns()])
        self.log_file = _continued(self.log_file, header)
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.log_file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        size = os.fstat(fd).st_size
        if size == 0:
            os.write(fd, header)
        elif os.pread(fd, 1, size - 1) != b"\n":
            os.write(fd, b"\n")  # after a power cut: the torn line stays one line
        return fd

    def _gpu_columns(self) -> list[str]:
        return [f"gpu{i}_{name}_bytes" for i in range(self._n_gpus) for name in GPU_COLUMNS]

    def _row(self, now: Charge) -> None:
        """Append a row of ``now`` and the peak since the last one."""
        available = available_bytes()
        if self._least_available is None or available < self._least_available:
            self._least_available = available
        budget = "" if self.budget_bytes is None else self.budget_bytes
        row: list[object] = [
            "" if self._step is None else self._step,
            f"{time.time():.3f}",
            " ".join(self._phase.split()),  # a line break would tear the line
            now.total_bytes,
            self._interval_peak_bytes,
            now.file_bytes,
            available,
            budget,
        ]
        self._append(_line([*row, *self._gpu_cells()]))
        self._interval_peak_bytes = now.total_bytes
        self._last_row = time.monotonic()

    def _gpu_cells(self) -> list[int]:
        self._gpus = gpu_memory()[: self._n_gpus]
        cells = [0] * (len(GPU_COLUMNS) * self._n_gpus)
        for at, gpu in enumerate(self._gpus):
            # Others may reset torch's peak (the planner does): ours never goes back.
            peak = max(self._gpu_peaks.get(gpu.index, 0), gpu.peak_allocated_bytes)
            self._gpu_peaks[gpu.index] = peak
            cells[3 * at : 3 * at + 3] = gpu.allocated_bytes, gpu.reserved_bytes, peak
        return cells

    def _append(self, line: bytes) -> None:
        """One write, one line. A log that cannot be written is said once; the work goes on."""
        if self._fd < 0:
            return
        try:
            os.write(self._fd, line)
        except OSError as error:
            self._close()
            text = f"{self.log_file}: {error.strerror}; memory is not logged from here on"
            print(text, file=sys.stderr, flush=True)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _line(cells: Sequence[object]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode()


def _continued(path: Path, header: bytes) -> Path:
    """``path``, or NAME-2.csv … where that log has other columns (a resumed run with more GPUs)."""
    for n in range(2, 1000):
        if not path.exists() or path.stat().st_size == 0:
            return path
        with path.open("rb") as file:
            if file.readline() == header:
                return path
        stem = path.stem if n == 2 else path.stem.rpartition("-")[0]
        path = path.with_name(f"{stem}-{n}{path.suffix}")
    raise ConfigError(f"{path}: a thousand logs of other columns are there; clear the folder")
