"""``raypipe report``: rebuild a run's page from what is saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from raypipe.errors import ConfigError
from raypipe.report import build_report


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Rebuild report.html from the files of a run folder."""

    run: Positional[Path | None] = None
    """A run folder: of a fit (one subject or several), or OUTPUT/runs/extract-… of an extraction."""
    run_dir: Path | None = None
    """The same, as the other commands take it."""

    def __post_init__(self) -> None:
        if (self.run is None) == (self.run_dir is None):
            raise ConfigError("report takes one run folder; write raypipe report RUN_DIR")

    @property
    def folder(self) -> Path:
        """The run folder, however it was given."""
        chosen = self.run or self.run_dir
        assert chosen is not None  # checked when made
        return chosen


def report(cfg: ReportConfig) -> Path:
    """Write the page and say where it is. Raises MissingInput, StoreCorrupt."""
    page = build_report(cfg.folder)
    print(page)
    return page
