"""Small tasks on real .npy files, and one thread for tests that time or count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from image_tasks import write_images
from train_helpers import ToyTask, write_toy


@pytest.fixture
def toy(tmp_path: Path) -> ToyTask:
    """ToyTask on 43 training and 7 validation rows in ``tmp_path/data``."""
    return write_toy(tmp_path / "data")


@pytest.fixture
def noisy(toy: ToyTask) -> ToyTask:
    """The toy with dropout: resuming must restore the generators too."""
    return replace(toy, dropout=0.4)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of every ``ImageTask``."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors on many threads take longer than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
