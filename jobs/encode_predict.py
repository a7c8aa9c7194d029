"""`ray job submit -- python jobs/encode_predict.py …`: the same flags and run function as the CLI's."""

from __future__ import annotations

import sys

from raypipe.cli import entry
from raypipe.encoding.assess import predict
from raypipe.encoding.config import PredictConfig

if __name__ == "__main__":
    sys.exit(entry(PredictConfig, predict, on_runner=False))
