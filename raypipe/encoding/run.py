"""The first job of brain encoding: fit, one run folder a subject. The others are ``assess``.

A subject's folder holds run.json, split.json, metrics.jsonl, checkpoints, evaluation/ and
report.html. The same command on the same folder goes on where it stopped; other data or another
model in it are refused. Training itself is ``raypipe.train``'s, by whatever runner is given.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raypipe.encoding import data
from raypipe.encoding.config import FitConfig
from raypipe.encoding.frozen import release
from raypipe.encoding.prepare import Prepared, prepare
from raypipe.encoding.split import save_split
from raypipe.errors import ConfigError
from raypipe.memory.attend import attend
from raypipe.memory.config import ResolvedMemory
from raypipe.memory.guard import relieve
from raypipe.provenance import run_record
from raypipe.read import available_subjects, normalise_subject
from raypipe.report import build_report
from raypipe.report.saved import RUN_FILE, read_run, write_json
from raypipe.runner import Runner
from raypipe.store import require_space
from raypipe.train import FitResult
from raypipe.train.folder import FitFolder
from raypipe.train.hold import hold_run
from raypipe.units import format_seconds

SPLIT_FILE = "split.json"


@dataclass(frozen=True, kw_only=True)
class SubjectFit:
    """What fitting one subject came to."""

    subject: str
    run_dir: Path
    result: FitResult


@dataclass(frozen=True, kw_only=True)
class FitSummary:
    """All subjects of a fit; report : the page written, None after a dry run."""

    run_dir: Path
    subjects: tuple[SubjectFit, ...] = ()
    report: Path | None = None


def fit(cfg: FitConfig, runner: Runner | None) -> FitSummary:
    """Fit an encoder for every subject of ``cfg`` and write the report.

    ``runner`` may be None for a dry run. Raises MissingInput, UnknownName, InputError (features and
    responses do not belong together), ConfigError (the folder holds another run), NoSpace, and what
    training raises; StoreLocked when another fit works in the run folder or in a subject's.
    """
    # Workers and later commands have other working directories.
    cfg = replace(cfg, images=replace(cfg.images, weights=cfg.images.absolute_weights()))
    subjects = _subjects(cfg)
    run_dir = cfg.run_dir.resolve()
    folders = {s: run_dir / f"subj{s}" if len(subjects) > 1 else run_dir for s in subjects}
    # The driver's own part, which on the fly runs a backbone: under its budget too.
    with attend(runner.memory, None, "driver") if runner else nullcontext():
        prepared = {s: prepare(cfg, s, folder, runner) for s, folder in folders.items()}
    if cfg.dry_run:
        for ready in prepared.values():
            print(ready.describe(cfg))
        return FitSummary(run_dir=run_dir)
    if cfg.on_the_fly:  # the workers load their own
        release()
        relieve()
    if runner is None:
        raise ConfigError("fit needs a runner; open one with raypipe.launch.open_runner")
    require_space({ready.run_dir: ready.missing_bytes(cfg) for ready in prepared.values()})
    with ExitStack() as held:
        held.enter_context(hold_run(run_dir))
        if len(subjects) > 1:
            _check_parent(cfg, run_dir, folders)
            for folder in folders.values():  # a subject may be fitted directly at the same time
                held.enter_context(hold_run(folder))
            _write_parent(cfg, run_dir, folders)
        fits = tuple(_fit_subject(cfg, ready, runner) for ready in prepared.values())
        page = build_report(run_dir)
    print(f"report: {page}")
    return FitSummary(run_dir=run_dir, subjects=fits, report=page)


def _subjects(cfg: FitConfig) -> tuple[str, ...]:
    asked = cfg.subj or available_subjects(cfg.data_dir)
    return tuple(dict.fromkeys(normalise_subject(subj) for subj in asked))


def _fit_subject(cfg: FitConfig, ready: Prepared, runner: Runner) -> SubjectFit:
    folder = FitFolder(
        path=ready.run_dir,
        kind="encode fit",
        identity=ready.identity(),
        task=ready.task,
        train=cfg.train,
        workers=cfg.workers,
        device=cfg.device,
        resume=cfg.resume,
        n_parameters=ready.n_parameters(),
        noted=("val_r",),
        derived=("evaluation", "predictions"),
    )
    if folder.earlier():
        _save_split(ready)  # refuses another one
    done = folder.finished()
    if done is not None:
        best = "" if done.best_epoch is None else f", best epoch {done.best_epoch + 1}"
        print(f"subject {ready.subject}: complete already, {done.epochs} epochs{best}")
        return SubjectFit(subject=ready.subject, run_dir=ready.run_dir, result=done)
    absent = ready.split_data.subject.missing_families()
    if absent:
        print(f"subject {ready.subject}: no ROI masks of {', '.join(absent)}: readout without them")
    started = time.monotonic()
    result = folder.fit(runner, lambda: _claim(cfg, ready, runner.memory))
    print(_line(ready.subject, result, time.monotonic() - started))
    return SubjectFit(subject=ready.subject, run_dir=ready.run_dir, result=result)


def _claim(cfg: FitConfig, ready: Prepared, memory: ResolvedMemory) -> dict[str, Any]:
    """Write split.json; what run.json shall say."""
    if not cfg.resume:
        (ready.run_dir / SPLIT_FILE).unlink(missing_ok=True)
    _save_split(ready)
    ready.split_data.features.keep(ready.run_dir)
    return run_record(cfg) | {
        "subject": ready.subject,
        "inputs": {
            "data_dir": str(cfg.data_dir.resolve()),
            "features_dir": cfg.features_dir and str(cfg.features_dir.resolve()),
            "feature": ready.feature(cfg),
        },
        "features": _features_note(ready.split_data),
        "responses": {hemi: list(source.shape) for hemi, source in ready.task.responses.items()},
        "n_train": len(ready.split.train),
        "n_val": len(ready.split.val),
        "n_invalid": int((~ready.split_data.valid).sum()),
        "notes": _notes(cfg),
        "memory": memory.record(),
    }


def _save_split(ready: Prepared) -> None:
    save_split(ready.split, ready.split_data.features.names, ready.run_dir / SPLIT_FILE)


def _notes(cfg: FitConfig) -> list[str]:
    """What the report must say about these data."""
    notes = []
    if cfg.on_the_fly:
        notes.append(
            "Features were computed on the fly from the images, rounded as a store would round them;"
            " no store was made or read."
        )
    if not (cfg.data_dir / "planted.json").is_file():
        return notes
    return [
        *notes,
        "The responses are planted, not measured: each vertex is a known function of the image plus"
        " noise of known size (planted.json), so the noise ceiling is exact.",
    ]


def _features_note(opened: data.SplitData) -> dict[str, Any]:
    features = opened.features
    return {
        "path": str(features.path),
        "on_the_fly": features.backbone is not None,
        "shape": [opened.n_rows, *features.row_shape],
        "dtype": features.dtype,
        "fingerprint": features.fingerprint,
        "identity": dict(features.identity),
        "token_layout": dict(features.token_layout),
    }


def _check_parent(cfg: FitConfig, run_dir: Path, folders: Mapping[str, Path]) -> None:
    resumed = cfg.resume and (run_dir / RUN_FILE).exists()
    if resumed and read_run(run_dir).get("subjects") != _names(folders):
        raise ConfigError(
            f"{run_dir} holds a run of other subjects than {', '.join(folders)}; use a new run"
            " folder, or --no-resume to start over in this one"
        )


def _write_parent(cfg: FitConfig, run_dir: Path, folders: Mapping[str, Path]) -> None:
    fields = run_record(cfg) | {"kind": "encode fit", "subjects": _names(folders)}
    write_json(run_dir / RUN_FILE, fields)


def _names(folders: Mapping[str, Path]) -> dict[str, str]:
    return {subj: folder.name for subj, folder in folders.items()}


def _line(subject: str, result: FitResult, seconds: float) -> str:
    if result.stopped or result.best_epoch is None:
        return f"subject {subject}: stopped after {result.global_steps} steps; run again to go on"
    loss = result.best_val_loss
    return (
        f"subject {subject}: {result.epochs} epochs in {format_seconds(seconds)}, best epoch"
        f" {result.best_epoch + 1}, validation loss {loss:.4f}"
    )
