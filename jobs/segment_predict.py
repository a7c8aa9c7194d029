"""`ray job submit -- python jobs/segment_predict.py …`: the same flags and run function as the CLI's."""

from __future__ import annotations

import sys

from raypipe.cli import entry
from raypipe.segment.predict import SegmentPredictConfig, predict

if __name__ == "__main__":
    sys.exit(entry(SegmentPredictConfig, predict))
