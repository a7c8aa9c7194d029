"""raypipe: memory-bounded, Ray-distributed pipelines for scientific imaging.

Importing this package is cheap: what it exports is loaded when it is first used, and neither torch
nor ray before a part that needs it is.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "MemoryEfficientContext": "raypipe.fmri.loader",
    "MemoryEfficientLoader": "raypipe.fmri.loader",
    "MemoryMappedArray": "raypipe.fmri.loader",
    "create_memory_efficient_loader": "raypipe.fmri.loader",
    "MemoryConfig": "raypipe.memory",
    "process_large_image": "raypipe.tile",
    "load_tiff_stack": "raypipe.read.tiff",
}

__all__ = ["__version__", *_HOMES]  # what is not here, __getattr__ gives


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'raypipe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
