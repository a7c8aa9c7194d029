"""Shared by tests of fMRI runs: two small subjects, and which scans were read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_kit import make_data

from raypipe.fmri import commands as commands_module
from raypipe.fmri import series as series_module


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of subjects 01 and 02."""
    return make_data(tmp_path / "data")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The scans that were read, as they are."""
    seen: list[str] = []
    real = series_module.obtain

    def obtain(scan: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(scan.path.name)
        return real(scan, *args, **kwargs)

    monkeypatch.setattr(series_module, "obtain", obtain)
    return seen


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a run's page takes ten times a small run: tests of pages have it, others go without."""
    monkeypatch.setattr(commands_module, "write_report", lambda run_dir: run_dir / "report.html")
