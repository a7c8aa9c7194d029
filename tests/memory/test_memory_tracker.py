"""The log: true peaks, whole lines after kill -9, continued logs, the figure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from taking import taken

from raypipe.errors import ConfigError, MissingInput, StoreCorrupt
from raypipe.memory import tracker as tracking
from raypipe.memory.gpu import GpuMemory
from raypipe.memory.history import read_histories, read_history
from raypipe.memory.tracker import COLUMNS, MemoryTracker

MIB = 1024**2
ROOT = Path(__file__).parents[2]


def test_a_peak_between_two_rows_is_seen(tmp_path: Path) -> None:
    log = tmp_path / "new" / "memory.csv"
    with MemoryTracker(log, 60.0, budget_bytes=10**9, sample_interval=0.005) as tracker:
        tracker.update(step=7, phase="load")
        with taken(128 * MIB):
            time.sleep(0.2)
        tracker.update(step=8, phase="train")
        most = tracker.get_max_usage()
    history = read_history(log)
    at = history.at_peak
    assert history.peak_bytes[at] - history.charge_bytes[at] > 120 * MIB
    assert history.phase[at] == "load" and history.step[at] == 7
    assert history.budget == 10**9
    assert most["charge_bytes"] == history.peak_bytes[at]
    assert (most["step"], most["phase"]) == (7, "load") and most["samples"] > 10
    assert most["least_available_bytes"] == history.available_bytes[:-1].min()
    assert json.loads(json.dumps(most)) == most


def test_rows_come_by_themselves_and_the_thread_ends(tmp_path: Path) -> None:
    with MemoryTracker(tmp_path / "m.csv", 0.05, sample_interval=0.01):
        time.sleep(0.4)
        assert len(read_history(tmp_path / "m.csv").time_s) >= 4
    assert not [t for t in threading.enumerate() if t.name == "raypipe-memory-log"]
    history = read_history(tmp_path / "m.csv")
    assert (np.diff(history.time_s) >= 0).all() and time.time() - history.time_s[-1] < 30
    assert history.budget is None and np.isnan(history.step).all()
    assert (history.peak_bytes >= history.charge_bytes).all()


LOGGER = """
import sys, time
from raypipe.memory.tracker import MemoryTracker
with MemoryTracker(sys.argv[1], 0.02, budget_bytes=123, sample_interval=0.005) as tracker:
    step = 0
    while True:
        step += 1
        tracker.update(step=step, phase=f"phase {step % 3}")
        if step == 200:
            time.sleep(0.1)
            tracker.update(step=step)
            print("ready", flush=True)
"""


def test_kill_9_leaves_whole_lines_and_the_log_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "m.csv"
    with subprocess.Popen(
        [sys.executable, "-c", LOGGER, str(log)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.kill()
    assert process.returncode == -9
    data = log.read_bytes()
    assert data.endswith(b"\n") and {line.count(b",") for line in data.splitlines()} == {7}
    history = read_history(log)
    assert len(history.step) == data.count(b"\n") - 1 and np.nanmax(history.step) >= 200
    with MemoryTracker(log, budget_bytes=123):
        pass
    assert log.read_bytes().startswith(data)
    assert len(read_history(log).step) == len(history.step) + 2
    assert log.read_text().count("time_s") == 1


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(1, 400))
def test_a_line_torn_by_a_power_cut_is_left_out(tmp_path_factory: Any, cut: int) -> None:
    folder = tmp_path_factory.mktemp("torn")
    log, header = folder / "m.csv", ",".join(COLUMNS)
    rows = [f"{i},{i}.5,a,{i},{i},{i},{i},9" for i in range(10, 40)]
    whole = "\n".join([header, *rows, ""])
    log.write_text(whole[:-cut])
    kept = whole[:-cut].count("\n") - 1
    assert read_history(log).step.tolist() == list(range(10, 10 + kept))
    with MemoryTracker(log):
        pass
    steps = read_history(log).step  # a torn line whose numbers are cut may still read as a row
    assert steps[:kept].tolist() == list(range(10, 10 + kept)) and np.isnan(steps[-2:]).all()


def test_phases_that_would_tear_a_line(tmp_path: Path) -> None:
    with MemoryTracker(tmp_path / "m.csv") as tracker:
        tracker.update(phase='a "quoted", long\nname')
    assert read_history(tmp_path / "m.csv").phase[-1] == 'a "quoted", long name'


def device(index: int, allocated: int, peak: int) -> GpuMemory:
    return GpuMemory(
        index=index, name="card", allocated_bytes=allocated, reserved_bytes=2 * allocated,
        peak_allocated_bytes=peak, used_bytes=0, total_bytes=100,
    )  # fmt: skip


def test_gpus_have_columns_and_a_peak_that_never_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [device(0, 5, 50), device(1, 0, 0)]
    monkeypatch.setattr(tracking, "gpu_memory", lambda: tuple(now))
    monkeypatch.setattr(tracking, "PHASE_ROW_S", 0.0)
    with MemoryTracker(tmp_path / "m.csv", 60.0) as tracker:
        now[0] = device(0, 7, 7)  # somebody reset torch's peak
        tracker.update(phase="next")
        most = tracker.get_max_usage()
    history = read_history(tmp_path / "m.csv")
    assert history.gpu_allocated_bytes[0].tolist() == [5, 7, 7]
    assert history.gpu_reserved_bytes[0].tolist() == [10, 14, 14]
    assert history.gpu_peak_bytes[0].tolist() == [50, 50, 50]
    assert history.gpu_peak_bytes[1].tolist() == [0, 0, 0]
    assert [gpu["peak_allocated_bytes"] for gpu in most["gpus"]] == [50, 0]


def test_a_log_of_other_columns_is_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with MemoryTracker(tmp_path / "m.csv"):
        pass
    monkeypatch.setattr(tracking, "gpu_memory", lambda: (device(0, 1, 1),))
    for _ in range(2):
        with MemoryTracker(tmp_path / "m.csv") as tracker:
            assert tracker.log_file == tmp_path / "m-2.csv"
    assert [h.name for h in read_histories(tmp_path)] == ["m-2", "m"]


def test_a_full_disk_is_said_once_and_the_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking, "PHASE_ROW_S", 0.0)
    with MemoryTracker(tmp_path / "m.csv", 60.0) as tracker:
        os_write = os.write

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(tracking.os, "write", full)
        for step in range(5):
            tracker.update(step=step, phase=str(step))
        monkeypatch.setattr(tracking.os, "write", os_write)
        assert tracker.get_max_usage()["charge_bytes"] > 0
    assert capsys.readouterr().err.count("memory is not logged") == 1
    assert len(read_history(tmp_path / "m.csv").step) == 1


@pytest.mark.parametrize("bad", [{"log_interval": 0.0}, {"sample_interval": -1.0}])
def test_intervals_are_above_zero(tmp_path: Path, bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        MemoryTracker(tmp_path / "m.csv", **bad)  # type: ignore[arg-type]


def test_no_log_or_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="MemoryTracker"):
        read_history(tmp_path / "none.csv")
    (tmp_path / "killed-at-once.csv").write_text(",".join(COLUMNS) + "\n")
    with pytest.raises(StoreCorrupt, match="no row"):
        read_history(tmp_path / "killed-at-once.csv")
    assert read_histories(tmp_path) == [] and read_histories(tmp_path / "nowhere") == []


def test_the_history_is_drawn(tmp_path: Path) -> None:
    with MemoryTracker(tmp_path / "m.csv", budget_bytes=2**30) as tracker:
        tracker.update(phase="x")
    file = tracker.plot_history(tmp_path / "plots" / "memory.png")
    with Image.open(file) as image:
        assert image.format == "PNG" and image.width > 1000
        assert np.asarray(image.convert("L")).std() > 5


def test_an_update_costs_microseconds(tmp_path: Path, record_property: Any) -> None:
    """Called at every step of training: about 10 us here, with the row once a second beside it."""
    with MemoryTracker(tmp_path / "m.csv") as tracker:
        tracker.update(phase="train")
        started = time.perf_counter()
        for step in range(2000):
            tracker.update(step=step)
        each = (time.perf_counter() - started) / 2000
    record_property("update_us", each * 1e6)
    assert each < 500e-6
    assert os.path.getsize(tmp_path / "m.csv") < 20_000  # noqa: PTH202


def test_phases_that_alternate_fast_share_rows(tmp_path: Path) -> None:
    with MemoryTracker(tmp_path / "m.csv", 60.0) as tracker:
        for step in range(300):
            tracker.update(step=step, phase="ab"[step % 2])
        assert tracker.get_max_usage()["phase"] in ("", "a", "b")
    assert len(read_history(tmp_path / "m.csv").step) < 60
