"""What made a predicted image, for whoever finds it later: OUTPUT.predict/run.json, and memory/ beside it.

    run.json     input, weights, threshold, tiles, versions, command; ``result`` once it is complete
    memory/      a log a process (``raypipe.memory``)

Resuming never reads it: what is on the disk of a result is ``raypipe.tile.ledger``'s to say. Of a result
that several runs made, those before the last are kept under ``earlier``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raypipe.errors import ConfigError
from raypipe.memory.attend import FOLDER
from raypipe.memory.history import read_histories
from raypipe.provenance import run_record
from raypipe.report.saved import RUN_FILE, read_json, write_json
from raypipe.runner import Needs, Runner
from raypipe.segment.channels import axes_taken
from raypipe.segment.model import record
from raypipe.segment.predict_plan import Ready, writes_nothing
from raypipe.store.space import explain_os_errors, may_write, nearest_parent
from raypipe.tile import Inferred
from raypipe.tile.files import files_of
from raypipe.tile.ledger import TileRun

if TYPE_CHECKING:
    from raypipe.segment.predict import SegmentPredictConfig

KIND = "segment predict"
_REMEDY = "give another --report-dir"


def check_folder(cfg: SegmentPredictConfig) -> None:
    """Raises ConfigError where the record's folder is another run's, or is no place for it."""
    folder, out = cfg.record_dir, cfg.output.absolute()
    if folder == out or out in folder.parents:
        raise ConfigError(f"report_dir {folder} lies in the output itself; give a folder beside it")
    place = nearest_parent(folder)
    if not (writes_nothing(cfg) or may_write(place)):
        raise ConfigError(
            f"report_dir {folder}: {place} is no folder that can be written; {_REMEDY}"
        )
    found = _read(folder)
    if found and found.get("kind") != KIND:
        whose = found.get("kind") or "another run"
        raise ConfigError(f"report_dir {folder} holds the record of {whose}; {_REMEDY}")
    # The usual folder lies beside its result, and may have been moved with it.
    if found and cfg.report_dir is not None and found["output"]["path"] != str(out):
        raise ConfigError(
            f"report_dir {folder} holds the record of {found['output']['path']}; {_REMEDY}"
        )


def fields_of(
    cfg: SegmentPredictConfig, ready: Ready, runner: Runner, needs: Needs
) -> dict[str, Any]:
    """All that is known before the first tile, as JSON types."""
    plan, saved = ready.plan, ready.saved
    normalisation = saved.normalisation
    return run_record(cfg) | {
        "kind": KIND,
        "input": {
            "files": [_file(path) for path in files_of(plan.source)],
            "frames": plan.source.frames,
            "channels": plan.source.channels,
            "space": list(plan.source.space),
            "axes": axes_taken(plan.source),
            "axes_note": ready.axes_note,
            "dtype": plan.source.dtype.name,
        },
        "model": {
            "run_dir": str(cfg.run_dir.absolute()),
            "checkpoint": cfg.checkpoint,
            "epoch": saved.epoch,
            "network": record(saved.spec),
            "normalisation": asdict(normalisation),
            "target": saved.target,
            "classes": saved.classes,
            "threshold": saved.threshold,
            "files": ready.weight_files,
        },
        "tiles": {
            "field": plan.about()["field"],
            "counts": list(plan.grid.counts),
            "all": plan.tiles,
            "window": list(plan.grid.window),
            "batch": plan.cfg.batch,
        },
        "output": {
            "path": str(plan.spec.path),
            "what": cfg.what,
            "shape": list(plan.spec.shape),
            "dtype": plan.spec.dtype,
            "bytes": plan.spec.nbytes,
        },
        # By these hashes the result knows its own: raypipe.tile.identity.
        "identity": plan.identity,
        "runner": runner.name,
        "device": needs.device,
        "workers": needs.workers,
        "memory": runner.memory.record(),
        "result": None,
    }


def begin(folder: Path, fields: Mapping[str, Any], run: TileRun) -> None:
    """Write run.json, before the first tile of this run."""
    before = _read(folder)
    same = run.kept and before and before["identity"] == run.identity
    earlier = [*before["earlier"], _without(before, "earlier")] if before and same else []
    _write(folder, {**fields, "kept": run.kept, "earlier": earlier})


def finish(folder: Path, found: Inferred, identity: Mapping[str, Any]) -> None:
    """Add the result, unless it is there: a run that found all done has made nothing.

    identity : of the result; a record of another one that was left here is not given it
    """
    fields = _read(folder)
    if fields is None or fields["result"] is not None:
        return
    if fields["identity"] != identity:
        return
    computed = found.tiles - found.kept
    if not (computed or may_write(folder)):  # an archive's record stays as it is
        return
    peaks = {h.name: int(h.peak_bytes[h.at_peak]) for h in read_histories(folder / FOLDER)}
    result = {
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "tiles": computed,
        "kept": found.kept,
        # None: killed after the last tile, before this was written.
        "seconds": found.seconds if computed else None,
        "peak_bytes": peaks,
    }
    _write(folder, {**fields, "result": result})


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / RUN_FILE
    return read_json(path, _REMEDY) if path.exists() else None


def _write(folder: Path, fields: Mapping[str, Any]) -> None:
    with explain_os_errors(folder, 1 << 16):
        write_json(folder / RUN_FILE, fields)


def _without(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name}


def _file(path: Path) -> dict[str, Any]:
    """Of a .zarr the bytes of all its files."""
    parts = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    stats = [part.stat() for part in parts]
    return {
        "path": str(path),
        "bytes": sum(stat.st_size for stat in stats),
        "modified": max((stat.st_mtime for stat in stats), default=None),
    }
