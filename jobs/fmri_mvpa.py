"""`ray job submit -- python jobs/fmri_mvpa.py …`: the same flags and run function as the CLI's."""

from __future__ import annotations

import sys

from raypipe.cli import entry
from raypipe.fmri.commands import mvpa
from raypipe.fmri.config import MvpaJobConfig

if __name__ == "__main__":
    sys.exit(entry(MvpaJobConfig, mvpa))
