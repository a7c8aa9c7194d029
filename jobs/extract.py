"""`ray job submit -- python jobs/extract.py …`: the same flags and run function as the CLI's."""

from __future__ import annotations

import sys

from raypipe.cli import entry
from raypipe.extract.config import ExtractConfig
from raypipe.extract.run import extract

if __name__ == "__main__":
    sys.exit(entry(ExtractConfig, extract))
