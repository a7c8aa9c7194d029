"""`ray job submit -- python jobs/segment_fit.py …`: the same flags and run function as the CLI's."""

from __future__ import annotations

import sys

from raypipe.cli import entry
from raypipe.segment.config import SegmentFitConfig
from raypipe.segment.run import fit

if __name__ == "__main__":
    sys.exit(entry(SegmentFitConfig, fit))
