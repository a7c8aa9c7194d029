"""``raypipe segment fit``: one run folder, which the same command resumes.

The folder holds run.json, model.json, pictures.json (which picture stands on which side), metrics.jsonl,
checkpoints, evaluation/ and report.html. Other data or another model in it are refused. Training itself
is ``raypipe.train``'s, by whatever runner is given; scoring whole pictures is ``assess``'s.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raypipe.errors import ConfigError
from raypipe.memory.attend import attend
from raypipe.memory.config import ResolvedMemory
from raypipe.provenance import run_record
from raypipe.report.html import PAGE_FILE
from raypipe.report.saved import write_json
from raypipe.runner import Runner
from raypipe.segment.config import SegmentFitConfig
from raypipe.segment.inputs import as_dict, keep
from raypipe.segment.page import write_report
from raypipe.segment.planted import PLANTED_FILE
from raypipe.segment.prepare import Prepared, prepare
from raypipe.segment.saved import save_model
from raypipe.store import require_space
from raypipe.train import FitResult
from raypipe.train.folder import FitFolder, best_epoch
from raypipe.train.hold import hold_run
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
    folder = FitFolder(
        path=ready.run_dir,
        kind=KIND,
        identity=ready.identity(),
        task=ready.task,
        train=cfg.train,
        workers=cfg.workers,
        device=cfg.device,
        resume=cfg.resume,
        n_parameters=ready.n_parameters(),
        noted=("val_dice", "val_iou", "val_threshold"),
        settled=ready.settled,
    )
    done = folder.finished()
    if done is not None:
        print(f"complete already: {_line(done)}")
        return done
    started = time.monotonic()
    result = folder.fit(runner, lambda: _claim(cfg, ready, runner.memory))
    print(f"{_line(result)}, in {format_seconds(time.monotonic() - started)}")
    return result


def _claim(cfg: SegmentFitConfig, ready: Prepared, memory: ResolvedMemory) -> dict[str, Any]:
    """Write model.json, pictures.json and inputs.json; what run.json shall say."""
    write_json(ready.run_dir / PICTURES_FILE, {"pictures": [as_dict(p) for p in ready.pictures]})
    keep(ready.run_dir, ready.inputs)
    save_model(ready.run_dir, ready.saved)
    return run_record(cfg) | {
        "inputs": {"data": str(cfg.inputs.data.resolve()), "folder": str(_folder(cfg.inputs.data))},
        "counts": ready.counts(),
        "n_train": ready.task.n_train,
        "n_val": len(ready.task.val_rows),
        "notes": _notes(cfg),
        "memory": memory.record(),
    }


def _folder(data: Path) -> Path:
    """Where the files lie: the folder, or that of the table."""
    return data.resolve() if data.is_dir() else data.resolve().parent


def _notes(cfg: SegmentFitConfig) -> list[str]:
    """What the report must say about these data."""
    if not (cfg.inputs.data / PLANTED_FILE).is_file():
        return []
    return [
        "The pictures are synthetic: nuclei drawn as ellipses under uneven light with noise"
        f" ({PLANTED_FILE}), so their instances are known without error."
    ]


def _line(result: FitResult) -> str:
    if result.stopped or result.best_epoch is None:
        return f"stopped after {result.global_steps} steps; run again to go on"
    best = best_epoch(result)
    text = f"{result.epochs} epochs, best epoch {result.best_epoch + 1}, validation Dice"
    text += f" {best['val_dice']:.3f}"
    if best.get("val_threshold") is not None:
        text += f" at threshold {best['val_threshold']:.3f}"
    return text
