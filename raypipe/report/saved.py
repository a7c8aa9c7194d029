"""The files of a run folder: written whole, read back with an error that helps.

    run.json         what was asked, with what, and what came of it
    metrics.jsonl    one record a step and an epoch (written by ``raypipe.train``)
    evaluation/SPLIT/summary.json, rois.csv, rois.parquet, vertices.parquet
    report.html      made from the files above by ``build_report``

A run of several subjects has a run.json that names their folders, and one of these in each.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import MissingInput, StoreCorrupt
from raypipe.store.durable import make_dirs, write_atomic

RUN_FILE = "run.json"


def write_bytes(path: Path, data: bytes) -> Path:
    """Put ``data`` at ``path``, all or nothing; makes the folder."""
    make_dirs(path.parent)
    write_atomic(path, data)
    return path


def write_json(path: Path, fields: Mapping[str, Any]) -> Path:
    """Write ``fields`` as indented JSON; NaN is an error, for JSON has none."""
    return write_bytes(path, (json.dumps(fields, indent=1, allow_nan=False) + "\n").encode())


def write_npy(path: Path, array: NDArray[Any]) -> Path:
    """Write a small array as .npy."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return write_bytes(path, buffer.getvalue())


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object at ``path``. Raises MissingInput with ``remedy``, StoreCorrupt."""
    try:
        fields = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise MissingInput(f"{path} is not there; {remedy}") from None
    except ValueError as error:
        raise StoreCorrupt(f"{path} is not JSON ({error}); {remedy}") from None
    if not isinstance(fields, dict):
        raise StoreCorrupt(f"{path} holds no JSON object; {remedy}")
    return fields


def read_run(run_dir: Path) -> dict[str, Any]:
    """run.json of a run folder. Raises MissingInput, StoreCorrupt."""
    remedy = "give a run folder, as raypipe encode fit or extract makes it"
    return read_json(run_dir / RUN_FILE, remedy)


def subject_folders(run_dir: Path) -> dict[str, Path]:
    """Subject -> its run folder: those that a run of several names, else the folder itself."""
    fields = read_run(run_dir)
    if "subjects" in fields:
        return {subject: run_dir / folder for subject, folder in fields["subjects"].items()}
    return {str(fields.get("subject", "")): run_dir}


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Records of metrics.jsonl, in order; a torn last line is left out, no file is no records."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n") and line.strip():
            records.append(json.loads(line))
    return records
