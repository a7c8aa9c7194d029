"""memory/: a budget for every process, what it holds of it, and what happens when it takes more.

``limits`` reads what the node gives, ``config`` makes a budget of it, ``statm``, ``gpu`` and
``probe`` read what is held, ``tracker`` logs it, ``history`` and ``figure`` read the log back.
Names load when they are used: importing this costs neither torch nor matplotlib.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raypipe.memory.config import MemoryConfig, MemoryFlags, ResolvedMemory, resolve
    from raypipe.memory.limits import NodeLimits, available_bytes, node_limits
    from raypipe.memory.probe import (
        MemoryInfo,
        MemoryMonitor,
        ProcessProbe,
        anon_bytes,
        charge_bytes,
        gpu_memory,
    )
    from raypipe.memory.tracker import MemoryTracker

__all__ = [
    "MemoryConfig", "MemoryFlags", "MemoryInfo", "MemoryMonitor", "MemoryTracker", "NodeLimits",
    "ProcessProbe", "ResolvedMemory", "anon_bytes", "available_bytes", "charge_bytes",
    "gpu_memory", "node_limits", "resolve",
]  # fmt: skip

_HOMES = {
    "config": ("MemoryConfig", "MemoryFlags", "ResolvedMemory", "resolve"),
    "limits": ("NodeLimits", "available_bytes", "node_limits"),
    "probe": ("MemoryInfo", "MemoryMonitor", "ProcessProbe", "anon_bytes", "charge_bytes",
              "gpu_memory"),
    "tracker": ("MemoryTracker",),
}  # fmt: skip


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"raypipe.memory.{home}"), name)
    raise AttributeError(f"module 'raypipe.memory' has no attribute {name!r}")
