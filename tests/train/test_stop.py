"""Ctrl-C while training: the step is saved, the next call goes on, nothing differs afterwards."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor, nn
from train_helpers import ToyTask, config, losses, write_toy

from raypipe.errors import ConfigError, Interrupted
from raypipe.runner import LocalRunner
from raypipe.train import finished
from raypipe.train.stop import note_training, stop_on_interrupt, stop_wished, unless_stopping

pytestmark = pytest.mark.usefixtures("heeded_sigint")


@dataclass(frozen=True)
class InterruptedTask(ToyTask):
    """Sends its own process SIGINT at a training step, as a terminal would."""

    at: int = 3
    calls: tuple[list[int], ...] = ([],)

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        self.calls[0].append(1)
        if len(self.calls[0]) == self.at:
            os.kill(os.getpid(), signal.SIGINT)
        return super().loss(model, batch)


def test_the_first_interrupt_is_a_wish_the_second_leaves(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt(tmp_path / "run"):
        assert not stop_wished(tmp_path / "run")
        os.kill(os.getpid(), signal.SIGINT)
        assert stop_wished(tmp_path / "run")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert not stop_wished(tmp_path / "run")
    assert capfd.readouterr().err.count("stopping after this step") == 1


def test_workers_that_wait_are_left_at_the_first_interrupt_those_that_train_at_the_second(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with (
        pytest.raises(Interrupted, match=f"while it waited to train in {tmp_path}") as stop,
        stop_on_interrupt(tmp_path, workers_wait=True),
    ):
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.value.exit_code == 130 and capfd.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) is before and not list(tmp_path.iterdir())
    with stop_on_interrupt(tmp_path, workers_wait=True):
        note_training(tmp_path, True)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop_wished(tmp_path)
        with pytest.raises(Interrupted, match="last checkpoint is kept"):
            unless_stopping(tmp_path)  # those that begin anew before the step is done
    unless_stopping(tmp_path)
    with pytest.raises(Interrupted), stop_on_interrupt(tmp_path, workers_wait=True):
        note_training(tmp_path, True)
        note_training(tmp_path, False)  # they begin anew
        os.kill(os.getpid(), signal.SIGINT)
    assert not list(tmp_path.iterdir())


def test_a_wish_left_by_a_killed_driver_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / ".stop").touch()
    with stop_on_interrupt(tmp_path):
        assert not stop_wished(tmp_path)


def test_an_ignored_interrupt_stays_ignored(tmp_path: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_on_interrupt(tmp_path):
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop_wished(tmp_path)


def test_off_the_main_thread_signals_are_left_alone(tmp_path: Path) -> None:
    seen: list[object] = []

    def body() -> None:
        with stop_on_interrupt(tmp_path):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


def test_an_interrupted_run_is_saved_and_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "data")
    broken = InterruptedTask(toy.data, dropout=0.2, at=3, calls=([],))
    with pytest.raises(Interrupted, match=r"stopped after \d+ steps") as stopped:
        LocalRunner().fit(broken, config(), tmp_path / "run", device="cpu")
    assert stopped.value.exit_code == 130
    assert len(losses(tmp_path / "run")) < 10, "it ran on"
    assert finished(tmp_path / "run", config(), 1) is None
    whole = ToyTask(toy.data, dropout=0.2)
    result = LocalRunner().fit(whole, config(), tmp_path / "run", device="cpu")
    LocalRunner().fit(whole, config(), tmp_path / "unbroken", device="cpu")
    np.testing.assert_array_equal(losses(tmp_path / "run"), losses(tmp_path / "unbroken"))
    again = finished(tmp_path / "run", config(), result.n_parameters)
    assert again is not None
    assert (again.history, again.best_epoch, again.global_steps) == (
        result.history,
        result.best_epoch,
        result.global_steps,
    )


def test_fewer_epochs_than_are_done_are_refused(tmp_path: Path) -> None:
    toy = write_toy(tmp_path / "data")
    LocalRunner().fit(toy, config(), tmp_path / "run", device="cpu")
    with pytest.raises(ConfigError, match="3 epochs done, --epochs 2 is fewer"):
        LocalRunner().fit(toy, config(epochs=2), tmp_path / "run", device="cpu")
    assert LocalRunner().fit(toy, config(epochs=4), tmp_path / "run", device="cpu").epochs == 4
