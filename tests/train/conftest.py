"""A small task on real .npy files, for every test of the loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from train_helpers import ToyTask, write_toy


@pytest.fixture
def toy(tmp_path: Path) -> ToyTask:
    """ToyTask on 43 training and 7 validation rows in ``tmp_path/data``."""
    return write_toy(tmp_path / "data")


@pytest.fixture
def noisy(toy: ToyTask) -> ToyTask:
    """The toy with dropout: resuming must restore the generators too."""
    return replace(toy, dropout=0.4)
