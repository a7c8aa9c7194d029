"""``raypipe segment fit``: one run folder, which the same command resumes.

The folder holds run.json, model.json, pictures.json (which picture stands on which side), metrics.jsonl,
checkpoints, evaluation/ and report.html. Other data or another model in it are refused. Training itself
is ``raypipe.train``'s, by whatever runner is given; scoring whole pictures is ``assess``'s.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raypipe.errors import ConfigError
from raypipe.memory.attend import attend
from raypipe.memory.config import ResolvedMemory
from raypipe.provenance import run_record
from raypipe.report.html import PAGE_FILE
from raypipe.report.saved import RUN_FILE, read_run, write_json
from raypipe.runner import Runner
from raypipe.segment.config import SegmentFitConfig
from raypipe.segment.page import write_report
from raypipe.segment.pictures import Picture
from raypipe.segment.planted import PLANTED_FILE
from raypipe.segment.prepare import Prepared, prepare
from raypipe.segment.saved import save_model
from raypipe.store import require_space
from raypipe.train import FitResult, finished
from raypipe.train.checkpoint import discard
from raypipe.train.feed import check_resumable
from raypipe.train.hold import hold_run
from raypipe.train.planner import PLAN_FILE, saved_plan
from raypipe.units import format_seconds

KIND = "segment fit"
PICTURES_FILE = "pictures.json"


@dataclass(frozen=True, kw_only=True)
class SegmentFit:
    """What a fit came to; result and report are None after a dry run."""

    run_dir: Path
    result: FitResult | None = None
    report: Path | None = None


def fit(cfg: SegmentFitConfig, runner: Runner | None) -> SegmentFit:
    """Fit the network of ``cfg`` and write the report.

    ``runner`` may be None for a dry run. Raises as `prepare`; ConfigError (the folder holds another
    run), NoSpace, StoreLocked (another fit works in the folder), and what training raises:
    MemoryBudgetExceeded leaves a checkpoint that the same command goes on from.
    """
    if cfg.dry_run:
        ready = prepare(cfg)
        print(ready.describe(cfg))
        return SegmentFit(run_dir=ready.run_dir)
    if runner is None:
        raise ConfigError("fit needs a runner; open one with raypipe.launch.open_runner")
    with attend(runner.memory, None, "driver"):
        ready = prepare(cfg)
    print(ready.counts())
    require_space({ready.run_dir: ready.missing_bytes(cfg)})
    with hold_run(ready.run_dir):
        result = _fit(cfg, ready, runner)
        page = write_report(ready.run_dir)
    print(f"report: {page}")
    return SegmentFit(run_dir=ready.run_dir, result=result, report=ready.run_dir / PAGE_FILE)


def _fit(cfg: SegmentFitConfig, ready: Prepared, runner: Runner) -> FitResult:
    done = _already_fitted(cfg, ready)
    if done is not None:
        print(f"complete already: {_line(done)}")
        return done
    record = _claim(cfg, ready, runner.memory)
    started = time.monotonic()
    result = runner.fit(
        ready.task,
        cfg.train,
        ready.run_dir,
        workers=cfg.workers,
        device=cfg.device,
        resume=cfg.resume,
    )
    record |= {"memory_plan": saved_plan(ready.run_dir), "result": _result(result)}
    write_json(ready.run_dir / RUN_FILE, record)
    print(f"{_line(result)}, in {format_seconds(time.monotonic() - started)}")
    return result


def _already_fitted(cfg: SegmentFitConfig, ready: Prepared) -> FitResult | None:
    """The result of this very fit, if it is over. Raises ConfigError for another run's folder."""
    run_file = ready.run_dir / RUN_FILE
    if not (cfg.resume and run_file.exists()):
        return None
    earlier = read_run(ready.run_dir)
    _check_same(earlier, ready)
    check_resumable(ready.task, cfg.train, cfg.workers, ready.run_dir)
    done = finished(ready.run_dir, cfg.train, ready.n_parameters())
    noted = (earlier.get("result") or {}).get("epochs")
    if done is not None and noted != done.epochs:  # killed before it was written
        write_json(run_file, {**earlier, "result": _result(done)})
    return done


def _claim(cfg: SegmentFitConfig, ready: Prepared, memory: ResolvedMemory) -> dict[str, Any]:
    """Write run.json, model.json and pictures.json, unless the folder holds another run."""
    folder = ready.run_dir
    run_file = folder / RUN_FILE
    earlier = read_run(folder) if run_file.exists() and cfg.resume else {}
    if earlier:
        _check_same(earlier, ready)
    if not cfg.resume:
        # Before run.json vouches for other data: a crash in between must leave nothing to resume.
        discard(folder)
        (folder / PLAN_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder / "evaluation", ignore_errors=True)
    if cfg.resume:  # a command that training would refuse must not overwrite run.json
        check_resumable(ready.task, cfg.train, cfg.workers, folder)
    record = run_record(cfg) | {
        "kind": KIND,
        "identity": ready.identity(),
        "inputs": {"data": str(cfg.inputs.data.resolve()), "folder": str(_folder(cfg.inputs.data))},
        "counts": ready.counts(),
        "n_train": ready.task.n_train,
        "n_val": len(ready.task.val_rows),
        "n_parameters": ready.n_parameters(),
        "notes": _notes(cfg),
        "memory": memory.record(),
        "result": earlier.get("result"),
    }
    write_json(folder / PICTURES_FILE, {"pictures": [_as_dict(p) for p in ready.pictures]})
    save_model(folder, ready.saved)
    write_json(run_file, record)
    return record


def _folder(data: Path) -> Path:
    """Where the files lie: the folder, or that of the table."""
    return data.resolve() if data.is_dir() else data.resolve().parent


def _as_dict(picture: Picture) -> dict[str, Any]:
    return {
        "image": str(picture.image),
        "mask": str(picture.mask),
        "frame": picture.frame,
        "rows": list(picture.rows),
        "cols": list(picture.cols),
        "split": picture.split,
        "channels": picture.channels,
    }


def _notes(cfg: SegmentFitConfig) -> list[str]:
    """What the report must say about these data."""
    if not (cfg.inputs.data / PLANTED_FILE).is_file():
        return []
    return [
        "The pictures are synthetic: nuclei drawn as ellipses under uneven light with noise"
        f" ({PLANTED_FILE}), so their instances are known without error."
    ]


def _check_same(found: Mapping[str, Any], ready: Prepared) -> None:
    before, now = found.get("identity"), ready.identity()
    if before == now:
        return
    if found.get("kind") != KIND or not isinstance(before, dict):
        raise ConfigError(
            f"{ready.run_dir} holds a run of {found.get('kind') or 'another kind'}; use a new run folder"
        )
    differing = [key for key in now if before.get(key) != now[key]]
    raise ConfigError(
        f"{ready.run_dir} holds a run of other {', '.join(differing)}; a resumed run must keep them:"
        " use a new run folder, or --no-resume to start over in this one"
    )


def _result(result: FitResult) -> dict[str, Any]:
    best = _best(result)
    return {
        "best_epoch": result.best_epoch,
        "best_val_loss": result.best_val_loss,
        **{f"best_{name}": best.get(name) for name in ("val_dice", "val_iou", "val_threshold")},
        "epochs": result.epochs,
        "global_steps": result.global_steps,
        "seconds": result.seconds,
        "stopped": result.stopped,
        "n_parameters": result.n_parameters,
    }


def _best(result: FitResult) -> Mapping[str, Any]:
    return next((e for e in result.history if e["epoch"] == result.best_epoch), {})


def _line(result: FitResult) -> str:
    if result.stopped or result.best_epoch is None:
        return f"stopped after {result.global_steps} steps; run again to go on"
    best = _best(result)
    text = f"{result.epochs} epochs, best epoch {result.best_epoch + 1}, validation Dice"
    text += f" {best['val_dice']:.3f}"
    if best.get("val_threshold") is not None:
        text += f" at threshold {best['val_threshold']:.3f}"
    return text
