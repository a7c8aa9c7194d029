"""Two workers who save in one run folder, and disks that do not take what one of them saves.

The other worker is made up: what it would say is what this one says.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from train_helpers import config

from raypipe.errors import StoreError, StoreLocked
from raypipe.store.flocks import Flock
from raypipe.train import checkpoint, saving
from raypipe.train.context import WorkerContext
from raypipe.train.metrics import MetricsLog
from raypipe.train.result import Progress
from raypipe.train.saving import LOCK, Saver


class OneOfTwo(WorkerContext):
    def collect(self, value: Any) -> list[Any]:
        return [value, value]

    def from_main(self, value: Any) -> Any:
        return value


def saver(ctx: WorkerContext) -> Saver:
    """Of a model without weights, after nine steps."""
    states = {name: lambda **how: {} for name in ("training_state", "model_state", "judged_state")}
    return Saver(
        config(), ctx, SimpleNamespace(**states), Progress(global_step=9), MetricsLog(None, 0),
        stream={}, started=0.0, seconds=lambda: 1.0,
    )  # fmt: skip


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
