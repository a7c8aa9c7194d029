"""Tiny subjects on disk: scans, masks, events; region "yes" follows the labels, region "no" does not.

And what tests of runs ask of them: results as they lie in the run folder, patterns as nilearn reads them.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nilearn.maskers import NiftiMasker

from raypipe.fmri.commands import FmriSummary, mvpa
from raypipe.fmri.config import MvpaJobConfig, RoiConfig
from raypipe.fmri.mvpa import MvpaConfig
from raypipe.fmri.units import Unit
from raypipe.runner import LocalRunner

SHAPE, N_VOLUMES, T_R_S, N_RUNS = (6, 5, 4), 40, 2.0, 3
AFFINE = np.diag([3.0, 3.0, 3.0, 1.0])
BLOCK = 5  # volumes


def make_data(folder: Path, subjects: tuple[str, ...] = ("01", "02")) -> Path:
    """runs.csv of ``subjects`` with three runs each, and rois/{yes,no}.nii.gz; returns the table."""
    rois = folder / "rois"
    rois.mkdir(parents=True)
    for name, lo in (("yes", 0), ("no", 60)):
        image = np.zeros(np.prod(SHAPE), np.uint8)
        image[lo : lo + 20] = 1
        _save(image.reshape(SHAPE), rois / f"{name}.nii.gz")
    rows = [row for number, name in enumerate(subjects) for row in _subject(folder, name, number)]
    with (folder / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "runs.csv"


def _subject(folder: Path, name: str, seed: int) -> list[dict[str, str]]:
    rng = np.random.default_rng(seed)
    mean = rng.normal(size=(2, 20)) * 12
    rows = []
    for run in range(1, N_RUNS + 1):
        # In turn: labels that rise over a run would go with its linear trend.
        kinds = (np.arange(N_VOLUMES // BLOCK) + rng.integers(2)) % 2
        shown = np.repeat(kinds, BLOCK)
        values = 500 + rng.normal(size=(np.prod(SHAPE), N_VOLUMES)) * 10
        values[:20] += mean[shown].T
        stem = f"sub-{name}_run-{run}"
        bold = np.round(values).astype(np.int16).reshape(*SHAPE, N_VOLUMES)
        _save(bold, folder / f"{stem}_bold.nii.gz")
        _save(np.ones(SHAPE, np.uint8), folder / f"{stem}_mask.nii.gz")
        _events(folder / f"{stem}_events.tsv", kinds)
        files = {kind: f"{stem}_{kind}.nii.gz" for kind in ("bold", "mask")}
        rows.append({"subject": name, "run": f"{run}", **files, "events": f"{stem}_events.tsv"})
    return rows


def _events(path: Path, kinds: np.ndarray) -> None:
    lines = ["onset\tduration\ttrial_type\trating"]
    for block, kind in enumerate(kinds):
        onset = block * BLOCK * T_R_S
        lines.append(f"{onset}\t{BLOCK * T_R_S}\t{('cat', 'dog')[kind]}\t{kind * 2.5}")
    path.write_text("\n".join(lines) + "\n")


def _save(values: np.ndarray, path: Path) -> None:
    image = nibabel.Nifti1Image(values, AFFINE)
    if values.ndim == 4:
        image.header.set_zooms((3.0, 3.0, 3.0, T_R_S))
        image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, path)


def mvpa_config(table: Path, run_dir: Path, **more: Any) -> MvpaJobConfig:
    """Both regions, all classes, no delay, cache beside the run."""
    folder = table.parent
    values: dict[str, Any] = {
        "table": table,
        "run_dir": run_dir,
        "roi": (f"yes={folder}/rois/yes.nii.gz", f"no={folder}/rois/no.nii.gz"),
        "cache_dir": run_dir.parent / "cache",
        "delay_s": 0.0,
        "mvpa": MvpaConfig(scores=("accuracy",)),
    }
    return MvpaJobConfig(**values | more)


def roi_config(table: Path, run_dir: Path, **more: Any) -> RoiConfig:
    """Time series of both regions, as they are."""
    both = mvpa_config(table, run_dir)
    values: dict[str, Any] = {name: getattr(both, name) for name in ("roi", "cache_dir")}
    return RoiConfig(**{"table": table, "run_dir": run_dir, **values} | more)


def unit(name: str = "V1", key: str = "k1") -> Unit:
    """A unit of subject 01."""
    return Unit(subject="01", roi=name, target="all", key=key)


def run(cfg: MvpaJobConfig) -> FmriSummary:
    """Decode in this process."""
    return mvpa(cfg, LocalRunner())


def record(cfg: Any, name: str) -> dict[str, Any]:
    """The record of a unit."""
    found: dict[str, Any] = json.loads((cfg.run_dir / "units" / f"{name}.json").read_text())
    return found


def written(cfg: Any) -> dict[str, int]:
    """Unit file -> when it was written."""
    return {path.name: path.stat().st_mtime_ns for path in (cfg.run_dir / "units").iterdir()}


def patterns(table: Path, subject: str, region: str) -> tuple[np.ndarray, ...]:
    """(patterns, labels, runs) of every volume, by nilearn and the events as they were written."""
    folder, parts, labels = table.parent, [], []
    for number in range(1, N_RUNS + 1):
        masker = NiftiMasker(
            folder / "rois" / f"{region}.nii.gz", detrend=True, standardize="zscore_sample"
        )
        parts.append(masker.fit_transform(folder / f"sub-{subject}_run-{number}_bold.nii.gz"))
        rows = (folder / f"sub-{subject}_run-{number}_events.tsv").read_text().split("\n")[1:-1]
        labels += [row.split("\t")[2] for row in rows for _ in range(5)]
    return np.vstack(parts), np.array(labels), np.repeat(np.arange(N_RUNS), N_VOLUMES)


def flags(table: Path, run_dir: Path, *more: str) -> list[str]:
    """The command line of ``mvpa_config``."""
    rois = [f"{name}={table.parent}/rois/{name}.nii.gz" for name in ("yes", "no")]
    return [
        *("fmri", "mvpa", "--table", str(table), "--run-dir", str(run_dir), "--roi", *rois),
        *("--delay-s", "0", "--scores", "accuracy", "--runner", "local"),
        *("--cache-dir", str(run_dir.parent / "cache"), *more),
    ]
