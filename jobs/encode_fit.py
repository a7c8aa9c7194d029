"""`ray job submit -- python jobs/encode_fit.py …`: the same flags and run function as the CLI's."""

from __future__ import annotations

import sys

from raypipe.cli import entry
from raypipe.encoding.config import FitConfig
from raypipe.encoding.run import fit

if __name__ == "__main__":
    sys.exit(entry(FitConfig, fit))
