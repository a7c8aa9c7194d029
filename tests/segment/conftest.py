"""Shared by the room's tests: one thread for torch, small synthetic nuclei, a run fitted to them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from segment_runs import config

from raypipe.runner import LocalRunner
from raypipe.segment import assess, run
from raypipe.segment.planted import PlantedNucleiConfig, make_planted_nuclei
from raypipe.segment.run import fit


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Small tensors on many threads take longer than on one, on a busy machine far longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def nuclei(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of {train,val,test}: 3, 1 and 2 pictures of 70 x 70 pixels."""
    cfg = PlantedNucleiConfig(n_train=3, n_val=1, n_test=2, size=70, seed=2)
    return make_planted_nuclei(tmp_path_factory.mktemp("nuclei"), cfg)


@pytest.fixture(scope="session")
def fitted(nuclei: Path, one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on them."""
    run_dir = tmp_path_factory.mktemp("run")
    fit(config(nuclei, run_dir), LocalRunner())
    return run_dir


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of matplotlib a run, for tests that do not look at the page."""
    for module in (run, assess):
        monkeypatch.setattr(module, "write_report", lambda run_dir: run_dir / "report.html")
