"""How a driver's order to leave reaches its controller, whatever goes wrong beside it. Without Ray."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raypipe.cluster import leaving, trainer
from raypipe.cluster.leaving import LeavesWithDriver, leave
from raypipe.errors import NoSpace


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Who was killed."""
    killed: list[object] = []
    monkeypatch.setattr(leaving, "ray", SimpleNamespace(kill=killed.append))
    monkeypatch.setattr(leaving, "LOOK_S", 0.001)
    return killed


class Away:
    """A file on a network disk that is away for the first looks."""

    def __init__(self) -> None:
        self.looks = 0

    def exists(self) -> bool:
        self.looks += 1
        if self.looks <= 3:
            raise OSError(116, "Stale file handle")
        return True


def test_a_disk_that_is_away_for_a_moment_does_not_keep_the_controller(
    tmp_path: Path, killed: list[object]
) -> None:
    callback = LeavesWithDriver(tmp_path)
    callback._file = away = Away()  # type: ignore[assignment]
    callback._look("me")
    assert killed == ["me"] and away.looks == 4


def test_it_ends_though_a_place_cannot_be_given_back(
    tmp_path: Path, killed: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise RuntimeError("cut off")

    monkeypatch.setattr(leaving, "_give_places_back", fails)
    leave(tmp_path)
    with pytest.raises(RuntimeError):
        LeavesWithDriver(tmp_path)._look("me")
    assert killed == ["me"]


class Trainer:
    """Trains until its driver's order is there."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.left = run_dir, threading.Event()

    def fit(self) -> Any:
        until = time.monotonic() + 5.0
        while not list(self.run_dir.glob(".leave*")):
            assert time.monotonic() < until, "nobody asked it to leave"
            time.sleep(0.001)
        self.left.set()
        raise RuntimeError("the controller is gone")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), NoSpace("full"), SystemExit(1)])
def test_whatever_a_driver_leaves_with_takes_the_training_along(
    tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tick() -> None:
        raise error

    monkeypatch.setattr(trainer, "POLL_S", 0.001)
    fake = Trainer(tmp_path)
    with pytest.raises(type(error)):
        trainer._fit_in_thread(fake, tmp_path, tick)  # type: ignore[arg-type]
    assert fake.left.is_set() and not list(tmp_path.iterdir())
