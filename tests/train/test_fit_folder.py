"""A fit's folder against a runner that is watched: what is asked, thrown away and written, in which order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from train_helpers import ToyTask, config

from raypipe.errors import ConfigError, WorkerFailed
from raypipe.runner import LocalRunner
from raypipe.train import FitResult
from raypipe.train.folder import FitFolder


class Watched(LocalRunner):
    """Says what was asked of it; cannot start, or fails, where it shall."""

    def __init__(self, *, refuses: bool = False, fails: bool = False) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.refuses, self.fails = refuses, fails

    def needs(self, workers: int | None, device: str) -> Any:
        self.asked.append(f"needs {workers} on {device}")
        if self.refuses:
            raise ConfigError("no room for it")
        return super().needs(workers, device)

    def fit(self, *args: Any, **options: Any) -> FitResult:
        self.asked.append(f"fit {options['workers']} on {options['device']}")
        if self.fails:
            raise WorkerFailed("the worker is gone")
        return super().fit(*args, **options)


def folder_of(toy: ToyTask, path: Path, **options: Any) -> FitFolder:
    given: dict[str, Any] = {"resume": True, "identity": {"data": "a"}, **options}
    return FitFolder(
        path=path, kind="toy fit", task=toy, train=config(epochs=1), workers=1, device="cpu",
        n_parameters=3, noted=("val_n",), **given,
    )  # fmt: skip


def claimed(runner: Watched, path: Path) -> dict[str, Any]:
    """What a room does: notes what is still there, and says what it is of."""
    left = sorted(p.name for p in path.iterdir()) if path.exists() else []
    runner.asked.append(f"claim {' '.join(left)}".strip())
    path.mkdir(exist_ok=True)
    return {"note": "ours"}


def fit(folder: FitFolder, runner: Watched) -> FitResult:
    return folder.fit(runner, lambda: claimed(runner, folder.path))


@pytest.fixture
def done(toy: ToyTask, tmp_path: Path) -> Path:
    """A finished fit, with results of its weights."""
    path, runner = tmp_path / "run", Watched()
    result = fit(folder_of(toy, path), runner)
    assert runner.asked == ["claim", "fit 1 on cpu"]
    found = json.loads((path / "run.json").read_text())
    assert (found["kind"], found["note"], found["n_parameters"]) == ("toy fit", "ours", 3)
    assert found["result"]["epochs"] == result.epochs == 1 and found["result"]["best_val_n"] == 7
    for name in ("evaluation", "predictions", "kept"):
        (path / name).mkdir()
    return path


def test_what_cannot_start_costs_nothing(toy: ToyTask, done: Path) -> None:
    before = {p: p.read_bytes() for p in done.rglob("*") if p.is_file()}
    runner = Watched(refuses=True)
    with pytest.raises(ConfigError, match="no room"):
        fit(folder_of(toy, done, resume=False), runner)
    assert runner.asked == ["needs 1 on cpu"]
    assert {p: p.read_bytes() for p in done.rglob("*") if p.is_file()} == before
    assert (done / "evaluation").is_dir()


def test_starting_over_drops_weights_and_what_came_of_them_first(toy: ToyTask, done: Path) -> None:
    runner = Watched(fails=True)
    with pytest.raises(WorkerFailed):
        fit(folder_of(toy, done, resume=False, derived=("evaluation", "predictions")), runner)
    left = runner.asked[1].split()
    assert [runner.asked[0], left[0], runner.asked[2]] == [
        "needs 1 on cpu",
        "claim",
        "fit 1 on cpu",
    ]
    assert "kept" in left and not {"best", "last", "evaluation", "predictions"} & set(left)
    assert json.loads((done / "run.json").read_text())["result"] is None


def test_a_run_that_goes_on_keeps_what_came_of_the_earlier(toy: ToyTask, done: Path) -> None:
    assert folder_of(toy, done).finished() is not None
    runner = Watched(fails=True)
    with pytest.raises(WorkerFailed):
        fit(folder_of(toy, done), runner)
    assert "best" in runner.asked[0] and "evaluation" in runner.asked[0]
    assert json.loads((done / "run.json").read_text())["result"]["epochs"] == 1


def test_another_runs_folder_is_refused_before_it_is_claimed(toy: ToyTask, done: Path) -> None:
    runner = Watched()
    with pytest.raises(ConfigError, match="other data"):
        fit(folder_of(toy, done, identity={"data": "b"}), runner)
    assert runner.asked == []
