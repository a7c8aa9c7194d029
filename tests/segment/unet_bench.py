"""benchmarks/unet_memory.py for the tests: its task, its sets of techniques and its counts are theirs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def unet_memory() -> Any:
    """The benchmark of that name."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        return importlib.import_module("unet_memory")
    finally:
        sys.path.pop(0)
