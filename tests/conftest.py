"""Shared by all tests: one Ray session, real inputs where they are, no network, no stray state."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray warns of its own future; in its worker processes our "warnings are errors" does not hold.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Several processes share the cores, each with threads for all of them: who waits shall sleep, not
# spin on a core that another one could use. Read when torch is loaded, so before all imports.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Beside other workers of pytest-xdist each core has its process: more threads only change places.
BESIDE_OTHERS = "PYTEST_XDIST_WORKER" in os.environ
if BESIDE_OTHERS:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is no finding: how long an example takes says nothing of what it shows.
settings.register_profile("raypipe", deadline=None)
settings.load_profile("raypipe")

ROOT = Path(__file__).parents[1]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """``-m ray`` leaves out files that hold no such test: importing them all takes a while."""
    if config.option.markexpr != "ray" or collection_path.suffix != ".py":
        return None
    return not _names_ray(collection_path) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where all files are read: a mark that ``-m ray`` would not find is an error.

    Of several workers none may begin a long file when the others are done: those come first.
    """
    if BESIDE_OTHERS:
        long = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in long)
    hidden = {item.path for item in items if item.get_closest_marker("ray")}
    for path in hidden:
        if not _names_ray(path):
            raise pytest.UsageError(f"{path} has Ray tests; write their mark as pytest.mark.ray")


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported stays: every collection of garbage, and code under memory pressure asks for
    many, would look through millions of objects again.
    """
    gc.collect()
    gc.freeze()


def _names_ray(path: Path) -> bool:
    return "mark.ray" in path.read_text()


@pytest.fixture(autouse=True, scope="session")
def _no_more_threads() -> Iterator[None]:
    """A run in this process takes all cores, and would leave as many threads to the tests after it."""
    with pytest.MonkeyPatch.context() as patched:
        if BESIDE_OTHERS and "torch" in sys.modules:
            patched.setattr(sys.modules["torch"], "set_num_threads", lambda n: None)
        yield


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
def mount(tmp_path: Path) -> Iterator[Callable[[str, str], Path]]:
    """Mounts a file system of (kind, options) for the test; skips where that is not allowed."""
    with ExitStack() as mounted:

        def new(kind: str, options: str) -> Path:
            if os.geteuid() != 0 or shutil.which("mount") is None:
                pytest.skip("mounting a small file system needs root and mount(8)")
            folder = tmp_path / kind
            folder.mkdir()
            argv = ["mount", "-t", kind, "-o", options, kind, str(folder)]
            done = subprocess.run(argv, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"this machine does not allow mounting a {kind}: {done.stderr.strip()}")
            mounted.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
            return folder

        yield new


@pytest.fixture
def small_disk(mount: Callable[[str, str], Path]) -> Path:
    """A tmpfs of 1 MiB."""
    return mount("tmpfs", "size=1m")


@pytest.fixture
def real_data() -> Path:
    """The folder of real inputs; skips, naming it, where it is not there."""
    folder = Path(os.environ.get("RAYPIPE_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real inputs are not at {folder}; set RAYPIPE_REAL_DATA")
    return folder
