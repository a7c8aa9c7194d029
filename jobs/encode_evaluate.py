"""`ray job submit -- python jobs/encode_evaluate.py …`: the same flags and run function as the CLI's."""

from __future__ import annotations

import sys

from raypipe.cli import entry
from raypipe.encoding.assess import evaluate
from raypipe.encoding.config import EvaluateConfig

if __name__ == "__main__":
    sys.exit(entry(EvaluateConfig, evaluate, on_runner=False))
