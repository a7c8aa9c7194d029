"""Two workers who save in one run folder, and disks that do not take what one of them saves.

The other worker is made up: what it would say is what this one says.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from train_helpers import config

from raypipe.errors import StoreError, StoreLocked
from raypipe.store.flocks import Flock
from raypipe.train import checkpoint, saving
from raypipe.train.context import WorkerContext
from raypipe.train.metrics import METRICS_FILE, MetricsLog
from raypipe.train.rescue import Rescue
from raypipe.train.result import Progress
from raypipe.train.saving import LOCK, Saver


class OneOfTwo(WorkerContext):
    def collect(self, value: Any) -> list[Any]:
        return [value, value]

    def from_main(self, value: Any) -> Any:
        return value


STATES = ("training_state", "model_state", "judged_state")
# Of a model without weights, after nine steps.
ENGINE: Any = SimpleNamespace(
    **{name: lambda **how: {} for name in STATES}, clear=lambda: None, moved=False
)
NINE = Progress(global_step=9)


def saver(ctx: WorkerContext) -> Saver:
    return Saver(
        config(), ctx, ENGINE, NINE, MetricsLog(None, 0),
        stream={}, started=0.0, seconds=lambda: 1.0,
    )  # fmt: skip


def end(ctx: WorkerContext) -> str:
    """What memory ends a fit with, on this worker alone."""
    numbers: Any = SimpleNamespace(settle=lambda: None)
    return str(Rescue(ctx, ENGINE, NINE, numbers, saver(ctx)).elsewhere("no room for 2 MiB"))


def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """What is saved from here on: its name, and whether another worker could save meanwhile."""
    found: list[tuple[str, bool]] = []
    real = checkpoint.save

    def save(run_dir: Path, name: str, *rest: Any) -> Path:
        lock = Flock(run_dir / LOCK)
        found.append((name, lock.try_exclusive()))
        lock.close()
        return real(run_dir, name, *rest)

    monkeypatch.setattr(checkpoint, "save", save)
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_who_saves_for_all_keeps_out_who_saves_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    found = written(monkeypatch)
    saver(OneOfTwo(run_dir=tmp_path, world=world)).save(best=True)
    assert found == [("best", world == 1), ("last", world == 1)]


def test_a_checkpoint_waits_for_the_one_who_saves_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "PATIENCE_S", 0.05)
    other = Flock(tmp_path / LOCK)
    assert other.try_exclusive()
    ours = saver(OneOfTwo(run_dir=tmp_path, world=2))
    with pytest.raises(StoreLocked, match="another worker has been saving"):
        ours.save(best=False)
    assert checkpoint.newest(tmp_path) is None
    other.close()
    ours.save(best=False)
    assert checkpoint.newest(tmp_path) is not None


def test_without_locks_rank_0_still_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(lock: Flock) -> bool:
        raise StoreError("this filesystem has no flock")

    monkeypatch.setattr(Flock, "try_exclusive", none)
    saver(OneOfTwo(run_dir=tmp_path, world=2)).save(best=False)
    assert checkpoint.newest(tmp_path) is not None


@pytest.mark.parametrize("log", [b"", b"\0\0\0\n"])
def test_a_log_that_cannot_be_read_does_not_stand_for_the_memory(
    tmp_path: Path, log: bytes
) -> None:
    """Zeros are what a disk may leave of a file that was being written when its machine went down."""
    (tmp_path / METRICS_FILE).write_bytes(log)
    said: list[str] = []
    ended = end(OneOfTwo(run_dir=tmp_path, rank=1, world=2, say=said.append))
    assert ended.startswith("the device ran out of memory (no room for 2 MiB)")
    assert (checkpoint.newest(tmp_path) is None) == bool(said) == bool(log)
    assert all("the last whole step is not saved: JSONDecodeError: " in line for line in said)


@pytest.mark.parametrize(("world", "who"), [(1, "checkpoint"), (2, "checkpoint"), (2, "lock")])
def test_a_disk_that_takes_nothing_does_not_stand_for_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, who: str
) -> None:
    def broken(*args: Any, **how: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(*((checkpoint, "save") if who == "checkpoint" else (os, "open")), broken)
    said: list[str] = []
    ended = end(OneOfTwo(run_dir=tmp_path, world=world, say=said.append))
    assert ended.startswith("the device ran out of memory (no room for 2 MiB)")
    assert len(said) == 1 and "is not saved: OSError: [Errno 5] Input/output error" in said[0]
