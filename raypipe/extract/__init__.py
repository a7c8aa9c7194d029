"""Images -> features: one backbone a worker, one shared store a feature, subject and split.

Stands beside the rooms in the river, since every room's images may pass through it.
``config`` says what to do, ``plan`` says where each row goes, ``worker`` computes, ``run`` drives.
"""

from __future__ import annotations

from raypipe.extract.config import ExtractConfig

__all__ = ["ExtractConfig"]
