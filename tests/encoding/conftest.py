"""A planted dataset of two subjects with stores beside it, made once, small enough for seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from encoding_kit import PLANTED, World, extract_toy, pageless

from raypipe.encoding import make_planted_dataset


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("planted")
    make_planted_dataset(root / "data", PLANTED)
    extract_toy(root / "data", root / "features")
    return World(root / "data", root / "features")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors on many threads take longer than on one, on a busy machine far longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_page() -> Iterator[None]:
    """For tests that do not look at it."""
    with pageless():
        yield
