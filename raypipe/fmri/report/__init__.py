"""The page of an fMRI run: RUN/report.html from its saved files alone.

``results`` reads the records, ``page`` decides what is shown, ``decoding`` makes the sections on scores,
``plots`` draws them, ``brain`` draws maps by nilearn. Blocks, template and the section on memory are
``raypipe.report``'s. matplotlib, nilearn and jinja2 load when a page is made.
"""

from __future__ import annotations

from pathlib import Path

from raypipe.report.html import PAGE_FILE, render
from raypipe.report.saved import write_bytes

__all__ = ["write_report"]


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html; returns its path.

    Raises MissingInput when ``run_dir`` is no run folder, StoreCorrupt when a file is damaged.
    """
    from raypipe.fmri.report.page import fmri_page

    return write_bytes(run_dir / PAGE_FILE, render(fmri_page(run_dir)).encode())
