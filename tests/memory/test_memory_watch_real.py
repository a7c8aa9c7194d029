"""The watch of real processes: who outgrows its budget is ended below it, by pidfd or by number."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raypipe.memory.ending import kill_by_number
from raypipe.memory.policy import Limits
from raypipe.memory.probe import ProcessProbe
from raypipe.memory.registration import Registration
from raypipe.memory.slot import Slot
from raypipe.memory.verdict import find
from raypipe.memory.watch import COMPILED, INTERPRETED, Watch

GIB = 1024**3
HOG = """
import sys, time
before = {held}
print("ready", flush=True)
sys.stdin.readline()
held = {what}
time.sleep(60)
"""


def hog(what: str, held: str = "None") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOG.format(what=what, held=held)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def watch_of(looks: str) -> Watch:
    """A started watch that takes its looks as said."""
    watch = Watch()
    watch.compile()
    watch.start()
    assert watch.looks.startswith(looks)
    return watch


def registration_of(process: subprocess.Popen[str], folder: Path) -> Registration:
    with ProcessProbe(process.pid) as probe:
        return Registration(
            pid=process.pid,
            start_ticks=probe.start_ticks,
            budget_bytes=GIB,
            label="hog",
            slot_path=Slot.create(folder / "slot").path,
            verdict_dir=folder,
        )


@pytest.mark.parametrize(
    ("looks", "what"),
    [
        (COMPILED, "bytearray(2 << 30)"),
        (COMPILED, "[bytearray(1 << 20) for _ in range(2048)]"),
        (INTERPRETED, "[bytearray(1 << 20) for _ in range(2048)]"),
    ],
)
def test_a_process_that_outgrows_its_budget_is_ended_below_it(
    looks: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if looks != COMPILED:
        monkeypatch.setitem(sys.modules, "raypipe.memory.stare", None)
    watch = watch_of(looks)
    assert watch.priority
    # It holds most of its budget beforehand: every look from now on is one near the limit.
    with hog(what, held="bytearray(b'1') * (600 << 20)") as process:
        registration = registration_of(process, tmp_path)
        watch.register(registration)
        time.sleep(0.2)
        assert watch.registrations == (registration,)
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        peak = 0
        while (now := _high_water_bytes(process.pid)) is not None:
            peak = max(peak, now)
        assert process.wait(timeout=10) == -9
        assert 0 < peak < GIB + 256 * 1024**2
    deadline = time.monotonic() + 5
    while watch.registrations and time.monotonic() < deadline:
        time.sleep(0.01)
    assert watch.registrations == ()
    watch.stop()
    verdict = find(tmp_path, registration.pid, registration.start_ticks)
    assert verdict is not None
    assert verdict.usage_bytes >= Limits.of(GIB).hard_bytes


def test_looks_are_compiled_soon_after_the_first_registration(tmp_path: Path) -> None:
    watch = Watch()
    watch.compile_after_s = 0.3
    watch.start()
    time.sleep(0.5)
    assert watch.looks == INTERPRETED, "nobody is there"
    with hog("0") as process:
        watch.register(registration_of(process, tmp_path))
        assert watch.looks == INTERPRETED
        deadline = time.monotonic() + 60
        while watch.looks != COMPILED and time.monotonic() < deadline:
            time.sleep(0.01)
        assert watch.looks == COMPILED
        process.kill()
    watch.stop()


def test_compiled_looks_hear_of_who_comes_and_goes_and_leave_nothing_open(tmp_path: Path) -> None:
    watch = watch_of(COMPILED)
    before = len(list(Path("/proc/self/fd").iterdir()))
    near = "bytearray(b'1') * (700 << 20)"
    with hog("0", held=near) as first, hog("0") as second:
        for number, process in enumerate((first, second)):
            (tmp_path / str(number)).mkdir()
            watch.register(registration_of(process, tmp_path / str(number)))
        time.sleep(0.3)
        assert [one.pid for one in watch.registrations] == [first.pid, second.pid]
        watch.unregister(second.pid)
        first.kill()
        deadline = time.monotonic() + 5
        while watch.registrations and time.monotonic() < deadline:
            time.sleep(0.01)
        assert watch.registrations == ()
        second.kill()
    watch.stop()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def _high_water_bytes(pid: int) -> int | None:
    """The kernel's own mark; None once the process has ended. (ru_maxrss starts at its parent's.)"""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = [line.split()[1] for line in lines if line.startswith("VmHWM")]
    return int(found[0]) * 1024 if found else None


def test_where_there_is_no_pidfd_a_process_is_ended_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """conda's Python has no os.pidfd_open; old kernels refuse the call."""

    def refused(pid: int, flags: int = 0) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("os.pidfd_open", refused)
    hog = subprocess.Popen([sys.executable, "-c", "x = b'1' * (400 << 20); input()"], stdin=-1)
    try:
        with ProcessProbe(hog.pid) as probe:
            start_ticks = probe.start_ticks
        Slot.create(tmp_path / "slot").close()
        watch = Watch()
        watch.register(
            Registration(
                pid=hog.pid,
                start_ticks=start_ticks,
                budget_bytes=512 << 20,
                label="hog",
                slot_path=tmp_path / "slot",
                verdict_dir=tmp_path,
            )
        )
        deadline = time.monotonic() + 30
        while hog.poll() is None and time.monotonic() < deadline:
            watch.tick()
            time.sleep(0.01)
        assert hog.wait(timeout=5) == -signal.SIGKILL
        watch.stop()
        assert find(tmp_path, hog.pid, start_ticks) is not None
    finally:
        hog.kill()
        hog.communicate()


def test_a_number_that_is_another_process_now_is_not_ended() -> None:
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)
    try:
        kill_by_number(other.pid, 1)
        time.sleep(0.2)
        assert other.poll() is None
    finally:
        other.kill()
        other.communicate()
