"""`ray job submit -- python jobs/fmri_roi.py …`: the same flags and run function as the CLI's."""

from __future__ import annotations

import sys

from raypipe.cli import entry
from raypipe.fmri.commands import roi
from raypipe.fmri.config import RoiConfig

if __name__ == "__main__":
    sys.exit(entry(RoiConfig, roi))
