"""Starts one contender of benchmarks/fmri.py in a fresh process, and watches its anonymous memory.

Both processes take turns on pipes: the child says where it is (``Child.mark``), and goes on when its
memory has been read. What counts is RssAnon, which the kernel cannot take back, every 5 ms.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raypipe.memory import ProcessProbe

HERE = Path(__file__).resolve().parent
MIB = 2**20
_EVERY_S = 0.005
_PREFIX = "@@"


@dataclass(kw_only=True)
class Seen:
    """marks : what the child told, by place; base_bytes : RssAnon after its imports.

    answer_bytes, peak_bytes : largest RssAnon until "answered", and until its end
    whole_s : from its imports to its end; process_s : from its start to "answered"
    """

    marks: dict[str, dict[str, Any]] = field(default_factory=dict)
    base_bytes: int = 0
    answer_bytes: int = 0
    peak_bytes: int = 0
    whole_s: float = 0.0
    process_s: float = 0.0

    @property
    def seconds(self) -> float:
        """From the imports to the answer."""
        return float(self.marks["answered"]["seconds"])

    @property
    def anon_mib(self) -> float:
        """The peak until its end, above what imports take."""
        return (self.peak_bytes - self.base_bytes) / MIB

    @property
    def total_mib(self) -> float:
        """The peak until its end, imports and Python included."""
        return self.peak_bytes / MIB


class Child:
    """The child's end of the pipes."""

    def __init__(self) -> None:
        # What libraries print must not be taken for marks.
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def mark(self, at: str, **told: Any) -> None:
        """Say where this process is, and wait until it has been looked at."""
        self._out.write(_PREFIX + json.dumps({"at": at, **told}) + "\n")
        self._out.flush()
        sys.stdin.readline()


def take_turn(contender: str, *, env: dict[str, str] | None = None, **spec: Any) -> Seen:
    """Run ``contender`` of fmri_child.py; ends the benchmark when it fails."""
    os.sync()  # what the last one wrote is not written out during this one
    path = f"{HERE.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [
        sys.executable,
        str(HERE / "fmri_child.py"),
        contender,
        json.dumps(spec, default=str),
    ]
    with tempfile.TemporaryFile("w+") as log:
        started = time.perf_counter()
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **(env or {})},
        )
        seen = _watch(child, started)
        if child.returncode or "answered" not in seen.marks:
            log.seek(0)
            sys.exit(f"{contender} ended with code {child.returncode}\n{log.read()}")
    return seen


def _watch(child: subprocess.Popen[str], started: float) -> Seen:
    assert child.stdout is not None and child.stdin is not None
    seen, began = Seen(), started
    with _Sampler(child.pid) as sampler:
        for line in child.stdout:
            if not line.startswith(_PREFIX):
                continue
            told = json.loads(line.removeprefix(_PREFIX))
            at = told.pop("at")
            seen.marks[at] = told
            if at == "imported":
                seen.base_bytes = sampler.restart()
                began = time.perf_counter()
            elif at == "answered":
                sampler.look()
                seen.answer_bytes = sampler.peak_bytes
                seen.process_s = time.perf_counter() - started
            child.stdin.write("\n")
            child.stdin.flush()
        child.wait()
        seen.whole_s = time.perf_counter() - began
        seen.peak_bytes = sampler.peak_bytes
    return seen


class _Sampler:
    """The largest RssAnon of one process, looked at from a thread."""

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._probe = ProcessProbe(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def look(self) -> int:
        """RssAnon now; 0 when the process has ended."""
        try:
            now = self._probe.read().anon_bytes
        except ProcessLookupError:
            return 0
        self.peak_bytes = max(self.peak_bytes, now)
        return now

    def restart(self) -> int:
        """RssAnon now, from which the peak is counted anew."""
        self.peak_bytes = 0
        return self.look()

    def _run(self) -> None:
        while not self._stop.wait(_EVERY_S):
            self.look()

    def __enter__(self) -> _Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._probe.close()
