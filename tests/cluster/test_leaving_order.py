"""How a driver's order to leave reaches its controller, whatever goes wrong beside it. Without Ray."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raypipe.cluster import leaving, trainer
from raypipe.cluster.leaving import LeavesWithDriver, leave
from raypipe.errors import Interrupted, NoSpace, in_one_line
from raypipe.train.stop import note_training, stop_on_interrupt, stop_wished


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
    callback = LeavesWithDriver(tmp_path, "w")
    callback._file = away = Away()  # type: ignore[assignment]
    callback._look("me")
    assert killed == ["me"] and away.looks == 4


def test_it_ends_though_a_place_cannot_be_given_back(
    tmp_path: Path, killed: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise RuntimeError("cut off")

    monkeypatch.setattr(leaving, "_give_places_back", fails)
    leave(tmp_path, "w")
    with pytest.raises(RuntimeError):
        LeavesWithDriver(tmp_path, "w")._look("me")
    assert killed == ["me"]


@pytest.mark.usefixtures("heeded_sigint")
def test_workers_that_begin_anew_wait_and_do_not_begin_where_one_asked_to_stop(
    tmp_path: Path, killed: list[object]
) -> None:
    callback = LeavesWithDriver(tmp_path, "w")
    with (
        pytest.raises(Interrupted, match=r"while it waited to train.*no step was under way"),
        stop_on_interrupt(tmp_path, workers_wait=True),
    ):
        note_training(tmp_path, True)
        assert callback.on_controller_start_worker_group(num_workers=1) is None
        os.kill(os.getpid(), signal.SIGINT)
    with stop_on_interrupt(tmp_path, workers_wait=True):
        note_training(tmp_path, True)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop_wished(tmp_path)
        with pytest.raises(Interrupted, match="last checkpoint is kept"):
            callback.on_controller_start_worker_group(num_workers=1)


@pytest.fixture(autouse=True)
def asked_no_more(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whose request for nodes was taken back."""
    asked: list[str] = []

    def client(requester: str) -> SimpleNamespace:
        return SimpleNamespace(cancel_resource_request=lambda: asked.append(requester))

    monkeypatch.setattr(leaving, "TrainAutoscalingCoordinatorClient", client)
    return asked


class Trainer:
    """Trains until its driver's order is there, and is heard (``hears``)."""

    def __init__(self, run_dir: Path, name: str) -> None:
        self.setup = SimpleNamespace(run_dir=run_dir, name=name)
        self.train_run_context = SimpleNamespace(run_id=f"of-{name}")
        self.left, self.hears = threading.Event(), threading.Event()
        self.hears.set()

    def fit(self) -> Any:
        until = time.monotonic() + 5.0
        order = self.setup.run_dir / f".leave-{self.setup.name}"
        while not (self.hears.is_set() and order.exists()):
            assert time.monotonic() < until, "nobody asked it to leave"
            time.sleep(0.001)
        self.left.set()
        raise RuntimeError("the controller is gone")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), NoSpace("full"), SystemExit(1)])
def test_whatever_a_driver_leaves_with_takes_the_training_along(
    tmp_path: Path,
    error: BaseException,
    asked_no_more: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def tick() -> None:
        raise error

    monkeypatch.setattr(trainer, "POLL_S", 0.001)
    fake = Trainer(tmp_path, "w")
    with pytest.raises(type(error)):
        trainer._fit_in_thread(fake, fake.setup, tick)  # type: ignore[arg-type]
    assert fake.left.is_set() and not list(tmp_path.iterdir())
    assert asked_no_more == ["train-of-w"]


def test_a_disk_that_takes_no_order_does_not_hide_what_ended_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tick() -> None:
        raise NoSpace("full")

    monkeypatch.setattr(trainer, "POLL_S", 0.001)
    fake = Trainer(tmp_path / "gone", "w")  # no file can be made there
    with pytest.raises(NoSpace) as told:
        trainer._fit_in_thread(fake, fake.setup, tick)  # type: ignore[arg-type]
    assert in_one_line(told.value).startswith("full; also: the training cannot be told to end")


def test_the_next_training_does_not_withdraw_an_order_that_is_not_heard_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a session that goes on: the first controller hears nothing before the second trains."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "POLL_S", 0.001)
    monkeypatch.setattr(trainer, "LEAVE_S", 0.01)
    first, second = Trainer(tmp_path, "first"), Trainer(tmp_path, "second")
    first.hears.clear()
    for fake in (first, second):
        with pytest.raises(KeyboardInterrupt):
            trainer._fit_in_thread(fake, fake.setup, interrupted)  # type: ignore[arg-type]
    assert second.left.wait(5.0) and not first.left.is_set()
    first.hears.set()
    assert first.left.wait(5.0)
    until = time.monotonic() + 5.0
    while list(tmp_path.iterdir()):
        assert time.monotonic() < until, "an order stays for ever"
        time.sleep(0.001)
