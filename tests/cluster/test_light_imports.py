"""What Ray starts beside the workers of a training loads no torch: each would keep the first step waiting."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
def loaded():
    return [name for name in ("torch", "ray.train") if name in sys.modules]
from raypipe.cluster import node_memory, steps  # memory actors, read tasks
print("apart:", *loaded())
from raypipe.cluster import datasets, failures, torch_group  # the controller, the dataset manager
from raypipe.train import checkpoint
print("controller:", *loaded())
"""


def test_torch_is_the_workers_alone() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["apart:", "controller: ray.train"]
