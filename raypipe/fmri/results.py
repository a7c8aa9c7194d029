"""What a unit leaves behind: series as .npy, scores as Parquet, and the fields of its record.

A decoding's table, ``units/<unit_id>.parquet``, has one row a number: ``kind`` "fold" (``index`` the
fold) or "null" (``index`` the permutation; the mean over folds), ``score`` and ``value``, beside
subject, roi and target. Confusion matrix, classes, p values and predictions stand in the JSON record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raypipe.fmri.config import FmriConfig
from raypipe.fmri.content import content_of, digest
from raypipe.fmri.inputs import run_stem, small_files
from raypipe.fmri.ledger import write_whole
from raypipe.fmri.mvpa import MvpaResult
from raypipe.fmri.series import Joined, RunSeries, Subject
from raypipe.fmri.units import RoiSpec, Unit, slug
from raypipe.read.nifti import Scan
from raypipe.read.runfiles import RunFiles

SERIES = "series"


def save_series(run_dir: Path, unit: Unit, run: RunFiles, series: RunSeries) -> dict[str, Any]:
    """Write ``series/sub-01_run-1_roi-V1.npy``, (volumes, voxels) float32 as nilearn's maskers give it;
    return its row of the table.
    """
    values, cleaned = series.cleaned.values, series.cleaned
    path = run_dir / SERIES / f"{run_stem(run, series.index)}_roi-{slug(unit.roi)}.npy"
    # In file order the transposed view is the array itself: nothing is copied.
    write_whole(path, lambda file: np.save(file, values.T), need_bytes=values.nbytes)
    return {
        "subject": run.subject,
        "session": run.session,
        "task": run.task,
        "run": run.run,
        "roi": unit.roi,
        "file": str(path.relative_to(run_dir)),
        "n_voxels": values.shape[0],
        "n_volumes": values.shape[1],
        "not_finite": int(cleaned.not_finite.sum()),
        "constant": int(cleaned.constant.sum()),
        "scrubbed": series.n_volumes - values.shape[1],
        "way": series.way,
    }


def save_decoding(path: Path, unit: Unit, result: MvpaResult) -> Path:
    """Write the table of ``result``; see the module."""
    rows = [
        (kind, index, score, float(value))
        for kind, found in (("fold", result.folds), ("null", result.null))
        for score, values in found.items()
        for index, value in enumerate(values)
    ]
    names = {"subject": unit.subject, "roi": unit.roi, "target": unit.target}
    table: dict[str, Any] = {name: pa.array([word] * len(rows)) for name, word in names.items()}
    for place, name in enumerate(("kind", "index", "score", "value")):
        table[name] = pa.array([row[place] for row in rows])
    return write_whole(path, lambda file: pq.write_table(pa.table(table), file))


def roi_fields(
    cfg: FmriConfig, subject: Subject, spec: RoiSpec, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The record of a region's time series."""
    return _provenance(cfg, subject, spec) | {
        "series": list(rows),
        "n_voxels": max(row["n_voxels"] for row in rows),
        "outside_mask": sum(found.outside[spec.name] for found in subject.regions),
    }


def mvpa_fields(
    cfg: FmriConfig, subject: Subject, spec: RoiSpec, series: Joined, result: MvpaResult
) -> dict[str, Any]:
    """The record of a decoding."""
    told = result.to_dict()
    for name in ("subject", "roi", "target", "null", "warnings"):
        told.pop(name)
    null = {name: _band(values) for name, values in result.null.items()}
    return _provenance(cfg, subject, spec) | {
        **told,
        "null": null,
        "n_roi_voxels": series.values.shape[0],
        "n_volumes": series.values.shape[1],
        "not_finite": series.not_finite,
        "constant": series.constant,
        "outside_mask": subject.regions[0].outside[spec.name],
        "ways": list(series.ways),
    }


def _band(values: np.ndarray) -> dict[str, Any]:
    """Of scores of permuted labels; where all are undefined, None."""
    left = values[~np.isnan(values)]
    quantiles = np.quantile(left, (0.05, 0.5, 0.95)) if left.size else np.full(3, math.nan)
    low, middle, high = (None if math.isnan(q) else float(q) for q in quantiles)
    return {"n": len(values), "q05": low, "median": middle, "q95": high}


def _provenance(cfg: FmriConfig, subject: Subject, spec: RoiSpec) -> dict[str, Any]:
    pairs = zip(subject.scans, subject.runs, strict=True)
    return {"runs": [source_of(cfg, scan, run, spec) for scan, run in pairs]}


def source_of(cfg: FmriConfig, scan: Scan, run: RunFiles, spec: RoiSpec) -> dict[str, Any]:
    """Which files a run's numbers came from."""
    beside = [*([run.mask] if run.mask else []), *small_files(cfg, spec, run)]
    return {
        "run": run.name,
        "bold": str(scan.path),
        "size_bytes": scan.size_bytes,
        "header": scan.header_hash,
        "sample": content_of(scan),
        "shape": list(scan.shape),
        "dtype": scan.dtype.str,
        "slope": scan.slope,
        "inter": scan.inter,
        "t_r_s": scan.tr_s,
        "beside": [{"path": str(path), "xxh3_128": digest(path)} for path in beside],
    }
