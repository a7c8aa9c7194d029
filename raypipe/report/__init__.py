"""report/: what a run found, as numbers, plots and one HTML file.

``metrics`` is plain NumPy, ``plots`` draws figures, ``saved`` reads and writes the files of a run,
``sections`` decides what a page shows of them, ``memory`` and ``extraction`` of their own files,
``html`` puts the page together. Nothing here trains or predicts; neither torch nor ray is loaded,
matplotlib and jinja2 only when a page is made.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["build_report"]


def build_report(run_dir: Path) -> Path:
    """Write RUN/report.html from the run's saved files; see ``raypipe.report.html``."""
    from raypipe.report.html import build_report as build

    return build(run_dir)
