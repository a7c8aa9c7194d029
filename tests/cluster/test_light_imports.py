"""What of ours Ray loads beside the workers of a training brings no torch: the first step waits for it.
A driver that trains nothing has neither torch nor Ray's libraries.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import sys
def loaded():
    return [name for name in ("torch", "ray.train", "ray.data") if name in sys.modules]
from raypipe.cluster import runner, session  # a driver
print("driving:", *loaded())
from raypipe.cluster import node_memory, steps  # memory actors, read tasks
print("apart:", *loaded())
from raypipe.cluster import datasets, failures, leaving  # the dataset manager, callbacks
from raypipe.train import checkpoint
print("managing:", *loaded())
"""
# As `open_session` does, which is before the first training of a session.
LATE = """
import logging
from raypipe.cluster import session
session._quiet(VERBOSE)
from raypipe.cluster import datasets
print(logging.getLogger("ray.data").isEnabledFor(logging.WARNING))
"""


def said(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_torch_is_the_workers_alone() -> None:
    assert said(CODE) == ["driving:", "apart:", "managing: ray.train ray.data"]


@pytest.mark.parametrize("verbose", [False, True])
def test_a_library_that_is_loaded_later_is_as_quiet_as_was_asked(verbose: bool) -> None:
    assert said(LATE.replace("VERBOSE", str(verbose))) == [str(verbose)]
