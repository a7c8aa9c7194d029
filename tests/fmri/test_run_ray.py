"""fMRI runs on Ray: the numbers of a run in one process, and a worker that is killed loses one unit."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from run_kit import make_data, mvpa_config

from raypipe.cluster.runner import RayRunner
from raypipe.fmri.commands import mvpa
from raypipe.fmri.mvpa import EstimatorConfig, MvpaConfig
from raypipe.runner import LocalRunner

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

WAIT_S = 120.0


def workers() -> list[int]:
    """Actors of our pools, below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "PooledWorker" in " ".join(process.cmdline()[:1]):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def records(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Unit -> its record; those being replaced are left out."""
    found = {}
    for path in (run_dir / "units").glob("*.json"):
        try:
            found[path.stem] = json.loads(path.read_text()) | {"at": path.stat().st_mtime_ns}
        except FileNotFoundError:
            continue
    return found


def test_a_killed_worker_loses_the_unit_under_way_and_no_other(tmp_path: Path) -> None:
    table = make_data(tmp_path / "data", ("01", "02", "03"))
    # A refitted model and many permutations: half a second a unit, to be killed in.
    slow = MvpaConfig(
        model=EstimatorConfig(estimator="logistic"), n_permutations=60, scores=("accuracy",)
    )
    cfg = mvpa_config(table, tmp_path / "ray", mvpa=slow, workers=2)
    events: list[str] = []
    killed: list[int] = []
    before: dict[str, dict[str, Any]] = {}

    def kill() -> None:
        deadline = time.monotonic() + WAIT_S
        while not records(cfg.run_dir) and time.monotonic() < deadline:
            time.sleep(0.02)
        before.update(records(cfg.run_dir))
        killed.extend(workers())
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    summary = mvpa(cfg, RayRunner(joined=False, on_event=events.append))
    killer.join()
    assert before, "nothing was finished before the kill"
    assert any(f"worker {killed[0]} failed" in event for event in events)
    assert (summary.units, summary.computed, summary.failed) == (6, 6, {})
    after = records(cfg.run_dir)
    assert len(after) == 6
    for name, record in before.items():
        assert after[name]["at"] == record["at"], f"{name} was finished, and computed again"
    assert not list(cfg.run_dir.rglob("*.tmp"))

    here = mvpa_config(table, tmp_path / "local", mvpa=slow)
    mvpa(here, LocalRunner())
    for name, record in records(here.run_dir).items():
        for field in ("key", "folds", "null", "p", "predicted"):
            assert after[name][field] == record[field]

    again = mvpa(replace(cfg, workers=1), RayRunner(joined=False, on_event=events.append))
    assert (again.computed, again.found) == (0, 6)
