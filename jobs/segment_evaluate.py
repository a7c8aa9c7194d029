"""`ray job submit -- python jobs/segment_evaluate.py …`: the same flags and run function as the CLI's."""

from __future__ import annotations

import sys

from raypipe.cli import entry
from raypipe.segment.assess import evaluate
from raypipe.segment.config import SegmentEvaluateConfig

if __name__ == "__main__":
    sys.exit(entry(SegmentEvaluateConfig, evaluate, on_runner=False))
