"""Two fits in one run folder: the second one fails at once; a killed one leaves no lock."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raypipe.errors import StoreLocked
from raypipe.train.hold import hold_run

HOLD = """
import sys, time
from pathlib import Path
from raypipe.train.hold import hold_run
with hold_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    with hold_run(tmp_path / "run"):
        with (
            pytest.raises(StoreLocked, match=f"pid {os.getpid()} on"),
            hold_run(tmp_path / "run"),
        ):
            pass
        with hold_run(tmp_path / "other"):
            pass
    with hold_run(tmp_path / "run"):
        pass


def test_a_killed_holder_does_not_block(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StoreLocked, match=f"pid {holder.pid}"), hold_run(tmp_path):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with hold_run(tmp_path):
        pass
