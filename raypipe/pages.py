"""``raypipe report RUN``: every kind of run's page. Above the rooms, which make their own pages.

``raypipe.report`` has the blocks and the pages of extractions and fits; it knows no room.
"""

from __future__ import annotations

from pathlib import Path

from raypipe.report import build_report
from raypipe.report.commands import ReportConfig
from raypipe.report.saved import read_run


def report(cfg: ReportConfig) -> Path:
    """Write the page of ``cfg``'s run folder and say where it is. Raises MissingInput, StoreCorrupt."""
    page = _write(cfg.folder)
    print(page)
    return page


def _write(folder: Path) -> Path:
    kind = str(read_run(folder).get("kind", ""))
    room = kind.partition(" ")[0]
    if room == "fmri":
        from raypipe.fmri.report import write_report

        return write_report(folder)
    if kind == "segment predict":
        from raypipe.segment import predict_page

        return predict_page.write_report(folder)
    if room == "segment":
        from raypipe.segment import page

        return page.write_report(folder)
    return build_report(folder)
