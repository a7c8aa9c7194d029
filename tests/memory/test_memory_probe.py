"""What a process holds, against psutil and the kernel's own smaps; gone processes; the monitor."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from taking import taken

from raypipe.memory import gpu, probe, statm
from raypipe.memory.config import GIB, MemoryConfig
from raypipe.memory.probe import (
    Charge,
    MemoryMonitor,
    ProcessProbe,
    SharedTensors,
    anon_bytes,
    charge,
    charge_bytes,
    torch_shm_bytes,
)

MIB = 1024**2
HOLDER = "import sys; held = bytearray(int(sys.argv[1])); print('ready', flush=True); input()"


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    """A process that holds 64 MiB."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(64 * MIB)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def smaps_anonymous(pid: int) -> int:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    line = next(line for line in text.splitlines() if line.startswith("Anonymous:"))
    return int(line.split()[1]) * 1024


# ---- reading a process


def test_of_another_process_as_psutil_and_smaps_say(child: subprocess.Popen[str]) -> None:
    with ProcessProbe(child.pid) as probed:
        reading = probed.read()
    info = psutil.Process(child.pid).memory_info()
    assert reading.anon_bytes == pytest.approx(info.rss - info.shared, abs=MIB)
    assert reading.file_bytes == pytest.approx(info.shared, abs=MIB)
    assert reading.anon_bytes == pytest.approx(smaps_anonymous(child.pid), abs=2 * MIB)
    assert reading.anon_bytes > 64 * MIB and anon_bytes(child.pid) > 64 * MIB


def test_memory_taken_is_charged_and_given_back() -> None:
    before = charge_bytes()
    with taken(96 * MIB):
        assert charge_bytes() - before == pytest.approx(96 * MIB, abs=4 * MIB)
        assert anon_bytes() == pytest.approx(charge().anon_bytes, abs=2 * MIB)
    assert charge_bytes() - before < 4 * MIB


def test_pages_of_a_file_are_seen_and_not_charged(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(64 * MIB))
    before = charge()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[i] for i in range(0, len(mapped), 4096)) == 0
        now = charge()
        assert now.file_bytes - before.file_bytes > 56 * MIB
        assert now.total_bytes - before.total_bytes < 4 * MIB


@pytest.mark.parametrize("reaped", [False, True])
def test_a_process_that_ended_is_gone(child: subprocess.Popen[str], reaped: bool) -> None:
    with ProcessProbe(child.pid) as probed:
        probed.read()
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, still a zombie
        if reaped:
            child.wait()
        with pytest.raises(ProcessLookupError):
            probed.read()
    with pytest.raises(ProcessLookupError):
        ProcessProbe(child.pid)


def test_no_such_process() -> None:
    with pytest.raises(ProcessLookupError, match="no process"):
        anon_bytes(2**22 + 1)  # above any pid_max


def test_start_ticks_of_a_name_with_brackets(tmp_path: Path) -> None:
    program = tmp_path / "a) S 1 (b"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", program)
    with subprocess.Popen([program, "60"]) as process:
        try:
            with ProcessProbe(process.pid) as probed:
                began = psutil.boot_time() + probed.start_ticks / os.sysconf("SC_CLK_TCK")
            assert began == pytest.approx(psutil.Process(process.pid).create_time(), abs=1.5)
        finally:
            process.kill()


def test_descriptors_are_given_back(child: subprocess.Popen[str]) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(50):
        anon_bytes(child.pid)
        with pytest.raises(ProcessLookupError):
            ProcessProbe(2**22 + 1)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_a_forked_child_reads_itself() -> None:
    charge_bytes()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with taken(48 * MIB):
            os.write(writer, str(charge_bytes()).encode())
            os._exit(0)
    os.waitpid(pid, 0)
    in_child = int(os.read(reader, 100))
    os.close(reader), os.close(writer)
    assert in_child > charge_bytes() + 8 * MIB  # of its 48 MiB; what it shares is counted in both


def test_a_read_costs_microseconds(record_property: Any) -> None:
    """About 2 us measured here; the bound is for a busy machine."""
    with ProcessProbe(os.getpid()) as probed:
        costs = []
        for _ in range(20):
            started = time.perf_counter()
            for _ in range(500):
                probed.read()
            costs.append((time.perf_counter() - started) / 500)
    record_property("read_us", min(costs) * 1e6)
    assert min(costs) < 20e-6


def test_elsewhere_psutil_measures(
    monkeypatch: pytest.MonkeyPatch, child: subprocess.Popen[str]
) -> None:
    monkeypatch.setattr(statm, "ENFORCES", False)
    probed = ProcessProbe(child.pid)
    assert probed.read().anon_bytes == pytest.approx(psutil_uss(child.pid), abs=MIB)
    assert probed.read().anon_bytes > 64 * MIB
    child.kill()
    child.wait()
    with pytest.raises(ProcessLookupError, match="ended"):
        probed.read()
    with pytest.raises(ProcessLookupError, match="no process"):
        ProcessProbe(child.pid)


def psutil_uss(pid: int) -> int:
    return int(psutil.Process(pid).memory_full_info().uss)


# ---- what torch holds


def test_shared_tensors_are_charged_by_their_file() -> None:
    code = (
        "import torch.multiprocessing as mp, torch, os\n"
        "mp.set_sharing_strategy('file_system')\n"
        "held = torch.ones(8 << 20, dtype=torch.uint8).share_memory_()\n"
        "from raypipe.memory.probe import charge\n"
        "print(charge().shm_bytes, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert int(done.stdout) == pytest.approx(8 * MIB, abs=MIB // 8)


def test_shared_files_of_others_are_not_charged(child: subprocess.Popen[str]) -> None:
    mine, theirs = (Path(f"/dev/shm/torch_{p}_test") for p in (os.getpid(), child.pid))
    before = torch_shm_bytes()
    try:
        mine.write_bytes(bytes(2 * MIB))
        theirs.write_bytes(bytes(3 * MIB))
        assert torch_shm_bytes() - before == 2 * MIB
        assert torch_shm_bytes(child.pid) == 3 * MIB
        assert charge().shm_bytes == before + 2 * MIB
    finally:
        mine.unlink(missing_ok=True), theirs.unlink(missing_ok=True)


# ---- the monitor


@pytest.fixture
def monitor(monkeypatch: pytest.MonkeyPatch) -> MemoryMonitor:
    """Budget 4 GiB of which 1 is used; 6 GiB available, of which the buffer keeps 2."""
    found = MemoryMonitor(MemoryConfig(max_memory_per_process_gb=4.0, available_memory_buffer=0.2))
    found.limits = SimpleNamespace(limit_bytes=10 * GIB)  # type: ignore[assignment]
    monkeypatch.setattr(probe, "available_bytes", lambda: 6 * GIB)
    monkeypatch.setattr(probe, "charge", lambda: Charge(GIB, 0, 0, 3 * GIB))
    monkeypatch.setattr(gpu, "_nvml", lambda: None)
    return found


def test_what_fits_the_budget_and_the_node(
    monitor: MemoryMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert monitor.check_memory_threshold(3.0) and not monitor.check_memory_threshold(3.01)
    monkeypatch.setattr(probe, "available_bytes", lambda: 4 * GIB)  # 2 GiB above the buffer
    assert monitor.check_memory_threshold(2.0) and not monitor.check_memory_threshold(2.01)


def test_what_is_mapped(monitor: MemoryMonitor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not monitor.suggest_memmap(0.99) and monitor.suggest_memmap(1.0)
    monkeypatch.setattr(probe, "available_bytes", lambda: 2 * GIB)
    assert monitor.suggest_memmap(0.1)  # small, and still more than fits
    monitor.config = MemoryConfig(use_memmap=False)
    assert not monitor.suggest_memmap(100.0)


def test_a_line_a_person_can_read(
    monitor: MemoryMonitor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = monitor.log_memory_usage("loading")
    assert line == "loading: 1.00 GiB of 4.00 GiB, file pages 3.00 GiB, 6.00 GiB available"
    assert capsys.readouterr().err == line + "\n"
    monkeypatch.setattr(probe, "charge", lambda: Charge(5 * GIB, 0, 0, 0))
    assert "ABOVE its budget by 1.00 GiB" in monitor.log_memory_usage("x")
    monitor.config = MemoryConfig(monitor_memory_usage=False)
    capsys.readouterr()
    assert monitor.log_memory_usage("quiet") and capsys.readouterr().err == ""


def test_of_this_machine() -> None:
    info = MemoryMonitor().get_memory_info()
    assert info.total_gb == info.limits.limit_bytes / GIB
    assert info.available_gb == pytest.approx(psutil.virtual_memory().available / GIB, abs=1.0)
    assert 0 < info.charge.total_bytes < psutil.Process().memory_info().rss
    assert info.headroom_bytes == info.budget_bytes - info.charge.total_bytes


def test_shared_tensors_of_an_older_process_of_the_same_number_are_not_charged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raypipe.memory.probe._SHM", tmp_path)
    (tmp_path / f"torch_{os.getpid()}_1_0").write_bytes(bytes(1 << 20))
    assert torch_shm_bytes() == 1 << 20
    monkeypatch.setattr("raypipe.memory.probe._began_at", lambda pid: time.time() + 60)
    assert torch_shm_bytes() == 0


def test_processes_that_share_tensors_are_found_as_they_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raypipe.memory.probe._SHM", tmp_path)
    sharing = SharedTensors()
    assert sharing.pids() == set()
    for name in ("torch_12_1", "torch_12_2", "torch_7_1", "torch_x_1", "sem.mp-1"):
        (tmp_path / name).touch()
        sharing.pids()
    assert sharing.pids() == {7, 12}
    time.sleep(0.15)
    assert sharing.pids() == {7, 12}
    (tmp_path / "torch_7_1").unlink()
    assert sharing.pids() == {12}
    monkeypatch.setattr("raypipe.memory.probe._SHM", tmp_path / "gone")
    assert sharing.pids() == set()
