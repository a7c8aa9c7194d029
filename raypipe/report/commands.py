"""``raypipe report``: rebuild a run's page from what is saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from raypipe.report import build_report


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Rebuild report.html from the files of a run folder."""

    run_dir: Positional[Path]
    """A run folder, of one subject or of several."""


def report(cfg: ReportConfig) -> Path:
    """Write the page and say where it is. Raises MissingInput, StoreCorrupt."""
    page = build_report(cfg.run_dir)
    print(page)
    return page
