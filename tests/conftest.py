"""Shared by all tests: one Ray session, real inputs where they are, no network, no stray state."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray warns of its own future; in its worker processes our "warnings are errors" does not hold.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

# A busy machine is no finding: how long an example takes says nothing of what it shows.
settings.register_profile("raypipe", deadline=None)
settings.load_profile("raypipe")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray session for all tests marked ``ray``; started on first use."""
    from raypipe.cluster.session import open_session

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with open_session():
            yield


@pytest.fixture
def heeded_sigint() -> Iterator[None]:
    """Python's own SIGINT handler: a shell starts background jobs, and so the suite, with none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def real_data() -> Path:
    """The folder of real inputs; skips, naming it, where it is not there."""
    folder = Path(os.environ.get("RAYPIPE_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real inputs are not at {folder}; set RAYPIPE_REAL_DATA")
    return folder
