"""Where unpacked scans are kept when nobody says where.

By itself, so that a loader does not import what only decoding needs.
"""

from __future__ import annotations

import os
from pathlib import Path


def default_cache() -> Path:
    """Shared by all runs of a user: an ROI that one run has unpacked is there for the next."""
    named = os.environ.get("RAYPIPE_CACHE_DIR")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(home) / "raypipe" / "voxels"
