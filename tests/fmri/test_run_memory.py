"""Short of memory, fewer regions are read at once, down to one; then the run ends and says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from run_kit import (
    N_RUNS,
    mvpa_config,
    run,
)

from raypipe.errors import MemoryBudgetExceeded
from raypipe.fmri import work as work_module
from raypipe.memory.guard import NoGuard, guarding

pytestmark = pytest.mark.usefixtures("no_page")


class Pressed(NoGuard):
    """Memory is short at every boundary."""

    def pressure(self) -> bool:
        return True


def test_under_pressure_fewer_regions_are_read_at_once(
    table: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = mvpa_config(table, tmp_path / "run")
    monkeypatch.setattr(work_module, "current", Pressed)
    with guarding(Pressed()):
        assert run(cfg).computed == 4
    assert len(reads) == 2 * 2 * N_RUNS, "region by region"


def test_out_of_memory_halves_and_ends_at_one_region(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tried = work_module.joined, []

    def joined(cfg: Any, subject: Any, rois: list[str], **kwargs: Any) -> Any:
        tried.append(len(rois))
        if len(rois) > limit:
            raise MemoryError
        return real(cfg, subject, rois, **kwargs)

    monkeypatch.setattr(work_module, "joined", joined)
    limit = 1
    assert run(mvpa_config(table, tmp_path / "a")).computed == 4
    assert tried == [2, 1, 1, 2, 1, 1]
    limit = 0
    with pytest.raises(MemoryBudgetExceeded, match="out of memory with one ROI, yes of subject 01"):
        run(mvpa_config(table, tmp_path / "b"))
