"""A planted dataset of two subjects with stores beside it, made once, small enough for seconds."""

from __future__ import annotations

import pytest
from encoding_kit import PLANTED, World, extract_toy

from raypipe.encoding import make_planted_dataset


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("planted")
    make_planted_dataset(root / "data", PLANTED)
    extract_toy(root / "data", root / "features")
    return World(root / "data", root / "features")
