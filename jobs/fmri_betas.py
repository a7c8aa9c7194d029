"""`ray job submit -- python jobs/fmri_betas.py …`: the same flags and run function as the CLI's."""

from __future__ import annotations

import sys

from raypipe.cli import entry
from raypipe.fmri.glm.job import BetasConfig
from raypipe.fmri.glm.run import betas

if __name__ == "__main__":
    sys.exit(entry(BetasConfig, betas))
