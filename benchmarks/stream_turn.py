"""Starts one contender in a process of its own, and measures it from outside.

Its anonymous memory is read by `raypipe.memory.ProcessProbe`, of the consuming process alone; its
processor time is that of the whole tree below it, loader workers and Ray included.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from stream_data import Rows

from raypipe.memory import ProcessProbe

HERE = Path(__file__).resolve().parent
LIMIT_S = 180.0  # of one turn: what takes longer hangs


class TurnFailed(Exception):
    """A contender did not come to its end; the last line that it wrote says why."""


@dataclass(kw_only=True)
class Seen:
    """What the child told (``marks``) and what was read of it.

    base_bytes : RssAnon after its imports; peak_bytes : largest until its last measurement
    cpu_s : processor seconds of its tree between "warmed" and "measured"
    """

    marks: dict[str, dict[str, Any]] = field(default_factory=dict)
    base_bytes: int = 0
    first_bytes: int = 0
    peak_bytes: int = 0
    cpu_s: float = 0.0

    @property
    def gbps(self) -> float:
        """GB/s; beside the limit where that was measured."""
        return float(self.marks.get("paired", self.marks["measured"])["gbps"])


def interpreter(name: str) -> str:
    """The peer's own, by BENCH_PYTHON_NAME: some pin older libraries than ours."""
    return os.environ.get(f"BENCH_PYTHON_{name.upper()}", sys.executable)


def take_turn(
    contender: str,
    rows: Rows,
    n: int,
    npy: Path,
    folder: Path,
    *,
    do: str = "hot",
    workers: int = 0,
    seconds: float = 3.0,
    warm: float = 2.0,
) -> Seen:
    """Run the child for ``do`` (prepare, hot, cold, first). Raises TurnFailed."""
    spec = {
        "contender": contender, "rows": asdict(rows), "n": n, "npy": str(npy),
        "folder": str(folder), "do": do, "workers": workers, "seconds": seconds, "warm": warm,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = f"{HERE.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    log = folder.parent / f"{contender}.log"
    with log.open("w") as errors:
        child = subprocess.Popen(
            [interpreter(contender), str(HERE / "stream_child.py"), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            # A contender that forgets to close Ray must not start it a second time.
            env={**os.environ, "PYTHONPATH": path, "RAY_ENABLE_AUTO_CONNECT": "0"},
            start_new_session=True,
        )
        seen = Seen()
        with _ended_at_last(child), _Sampler(child.pid, seen) as sampler:
            _listen(child, seen, sampler)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(30)
    if do == "prepare" and child.returncode == 0:
        return seen
    if "done" not in seen.marks:
        raise TurnFailed(_last_line(log) or f"ended with code {child.returncode}")
    return seen


def _listen(child: subprocess.Popen[str], seen: Seen, sampler: _Sampler) -> None:
    assert child.stdout is not None and child.stdin is not None
    for line in child.stdout:
        if not line.startswith("@@"):
            continue
        said = json.loads(line[2:])
        at = said.pop("at")
        seen.marks[at] = said
        if at == "imported":
            seen.base_bytes = seen.peak_bytes = sampler.anon()
        elif at == "first":
            seen.first_bytes = sampler.anon()
        elif at == "warmed":
            seen.cpu_s = -_tree_cpu_s(child.pid)
        elif at == "measured":
            seen.cpu_s += _tree_cpu_s(child.pid)
            sampler.stop()  # what follows (the limit's buffers, the comparison) is not the loader
        child.stdin.write("\n")
        child.stdin.flush()


class _Sampler:
    """Keeps the largest RssAnon of one process, read every 10 ms."""

    def __init__(self, pid: int, seen: Seen) -> None:
        self._probe, self._seen = ProcessProbe(pid), seen
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def anon(self) -> int:
        """RssAnon now."""
        return self._probe.read().anon_bytes

    def stop(self) -> None:
        """Take no more samples."""
        self._stop.set()

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            try:
                anon = self.anon()
            except ProcessLookupError:
                return
            if "imported" in self._seen.marks:
                self._seen.peak_bytes = max(self._seen.peak_bytes, anon)

    def __enter__(self) -> _Sampler:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._probe.close()


def _tree_cpu_s(pid: int) -> float:
    """User and system seconds of a process and all below it."""
    total = 0.0
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total


@contextlib.contextmanager
def _ended_at_last(child: subprocess.Popen[str]) -> Iterator[None]:
    """Whatever the child started is gone afterwards, also when it hangs."""
    watch = threading.Timer(LIMIT_S, _end_tree, [child.pid])
    watch.start()
    try:
        yield
    finally:
        watch.cancel()
        if child.poll() is None:
            _end_tree(child.pid)
        child.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # its own session: nobody else is in it


def _end_tree(pid: int) -> None:
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        tree = [*root.children(recursive=True), root]
        for process in tree:
            process.terminate()
        time.sleep(2)
        for process in tree:
            with contextlib.suppress(psutil.Error):
                process.kill()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")
