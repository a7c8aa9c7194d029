"""The folder of a fit: what it holds already, whether that is the same fit, and what came of it.

Each room writes files of its own beside; what all need so that the same command goes on, no other one
writes over it, and one that cannot start costs nothing, is here. run.json says what was asked and what
came of it; it is written before training begins and again at its end. Who trains is ``raypipe.runner``'s.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from raypipe.errors import ConfigError
from raypipe.report.saved import RUN_FILE, read_run, write_json
from raypipe.train.checkpoint import discard
from raypipe.train.config import TrainConfig
from raypipe.train.feed import check_resumable
from raypipe.train.planner import PLAN_FILE, saved_plan
from raypipe.train.result import FitResult, finished
from raypipe.train.task import Task


class Trainer(Protocol):
    """What a fit asks of ``raypipe.runner.Runner``."""

    def resolve_device(self, device: str) -> str: ...

    def needs(self, workers: int | None, device: str) -> object: ...

    def fit(
        self,
        task: Task,
        cfg: TrainConfig,
        run_dir: Path,
        *,
        workers: int = 1,
        device: str = "auto",
        resume: bool = True,
    ) -> FitResult: ...


@dataclass(frozen=True, eq=False, kw_only=True)
class FitFolder:
    """One fit of ``task`` in ``path``.

    kind : as run.json names it. identity : what a run that goes on must share with the one before it,
    as plain values. noted : metrics of the best epoch that run.json repeats. derived : folders in it that
    are of its weights, and go with them. settled : what of an identity is compared, where an earlier one
    may name options that did nothing.
    """

    path: Path
    kind: str
    identity: Mapping[str, Any]
    task: Task
    train: TrainConfig
    workers: int
    device: str
    resume: bool
    n_parameters: int
    noted: tuple[str, ...] = ()
    derived: tuple[str, ...] = ("evaluation",)
    settled: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict

    def earlier(self) -> dict[str, Any]:
        """run.json of the run that this one goes on from; empty where there is none.

        Raises ConfigError when the folder holds another run.
        """
        if not (self.resume and (self.path / RUN_FILE).exists()):
            return {}
        found = read_run(self.path)
        self._check_same(found)
        return found

    def finished(self) -> FitResult | None:
        """The result of this very fit, if it is over. Raises ConfigError for another run's folder."""
        earlier = self.earlier()
        if not earlier:
            return None
        self._check_resumable()
        done = finished(self.path, self.train, self.n_parameters)
        told = (earlier.get("result") or {}).get("epochs")
        if done is not None and told != done.epochs:  # killed before it was written
            write_json(self.path / RUN_FILE, {**earlier, "result": self.summary(done)})
        return done

    def fit(self, runner: Trainer, claim: Callable[[], Mapping[str, Any]]) -> FitResult:
        """Train, and say so in run.json.

        claim : writes the room's own files, once nothing stands against it, and gives what run.json shall
        say. Raises ConfigError for another run's folder, what ``runner`` refuses, and what training raises.
        """
        earlier = self.earlier()
        self._make_way(runner)
        record = {**claim(), "kind": self.kind, "identity": self.identity}
        record |= {"n_parameters": self.n_parameters, "result": earlier.get("result")}
        write_json(self.path / RUN_FILE, record)
        result = runner.fit(
            self.task,
            self.train,
            self.path,
            workers=self.workers,
            device=self.device,
            resume=self.resume,
        )
        came = {"memory_plan": saved_plan(self.path), "result": self.summary(result)}
        write_json(self.path / RUN_FILE, {**record, **came})
        return result

    def _make_way(self, runner: Trainer) -> None:
        """Refuse what training would refuse; where nothing is resumed drop what is there, after that:
        what cannot start must not cost the old weights.
        """
        if self.resume:
            self._check_resumable()
            return
        runner.needs(self.workers, runner.resolve_device(self.device))
        # Before run.json vouches for other data: a crash in between must leave nothing to resume.
        discard(self.path)
        (self.path / PLAN_FILE).unlink(missing_ok=True)
        for old in self.derived:
            shutil.rmtree(self.path / old, ignore_errors=True)

    def summary(self, result: FitResult) -> dict[str, Any]:
        """``result`` for run.json."""
        best = best_epoch(result)
        return {
            "best_epoch": result.best_epoch,
            "best_val_loss": result.best_val_loss,
            **{f"best_{name}": best.get(name) for name in self.noted},
            "epochs": result.epochs,
            "global_steps": result.global_steps,
            "seconds": result.seconds,
            "stopped": result.stopped,
            "n_parameters": result.n_parameters,
        }

    def _check_resumable(self) -> None:
        check_resumable(self.task, self.train, self.workers, self.path)

    def _check_same(self, found: Mapping[str, Any]) -> None:
        before = found.get("identity")
        if found.get("kind") != self.kind:
            raise ConfigError(
                f"{self.path} holds a run of {found.get('kind') or 'another kind'}; use a new run folder"
            )
        before = self.settled(before) if isinstance(before, dict) else {}
        now = self.settled(self.identity)
        if before == now:
            return
        differing = [key for key in now if before.get(key) != now[key]]
        raise ConfigError(
            f"{self.path} holds a run of other {', '.join(differing)}; a resumed run must keep them:"
            " use a new run folder, or --no-resume to start over in this one"
        )


def best_epoch(result: FitResult) -> Mapping[str, Any]:
    """The metrics of the best epoch; empty before the first one is over."""
    return next((e for e in result.history if e["epoch"] == result.best_epoch), {})
