"""`ray job submit -- python jobs/fmri_searchlight.py …`: the same flags and run function as the CLI's."""

from __future__ import annotations

import sys

from raypipe.cli import entry
from raypipe.fmri.searchlight.job import SearchlightJobConfig
from raypipe.fmri.searchlight.run import run_searchlight

if __name__ == "__main__":
    sys.exit(entry(SearchlightJobConfig, run_searchlight))
