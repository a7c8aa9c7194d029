"""Memory actors of clusters of several nodes, and beside Ray's own monitor: a process a test, for they
cannot share the session.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def script(name: str, *args: str, timeout_s: float = 200) -> str:
    environ = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    path = Path(__file__).with_name(name)
    done = subprocess.run(
        [sys.executable, str(path), *args],
        env=environ, capture_output=True, text=True, timeout=timeout_s,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_late_node_gets_its_actor_and_a_lost_one_breaks_no_other(tmp_path: Path) -> None:
    assert "all good" in script("node_memory_cluster.py", str(tmp_path))


def test_rays_monitor_ends_the_hog_and_not_the_actor(tmp_path: Path) -> None:
    assert "all good" in script("node_memory_ray_monitor.py", str(tmp_path))
