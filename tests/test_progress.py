"""Progress lines off a terminal."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from raypipe import progress
from raypipe.progress import Progress


def test_lines_tell_rate_and_eta_and_do_not_count_resumed_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    out = io.StringIO()
    with Progress("extract", 100, "images", done=40, stream=out) as bar:
        now[0] = 5.0
        bar.update(10)
        now[0] = 20.0
        bar.update(10)
    lines = out.getvalue().splitlines()
    assert lines[0] == "extract 60/100 images (60 %), 1 images/s, ETA 40 s"
    assert len(lines) == 2  # one after 20 s, one at the end


def test_no_work_is_silent() -> None:
    out = io.StringIO()
    with Progress("extract", 10, "images", done=10, stream=out):
        pass
    assert out.getvalue() == ""
