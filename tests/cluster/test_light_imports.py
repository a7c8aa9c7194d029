"""What of ours Ray loads beside the workers of a training brings no torch: the first step waits for it."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
def loaded():
    return [name for name in ("torch", "ray.train") if name in sys.modules]
from raypipe.cluster import node_memory, steps  # memory actors, read tasks
print("apart:", *loaded())
from raypipe.cluster import datasets, failures  # the dataset manager, a callback
from raypipe.train import checkpoint
print("managing:", *loaded())
"""


def test_torch_is_the_workers_alone() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["apart:", "managing: ray.train"]
