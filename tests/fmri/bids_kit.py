"""A small fMRIPrep output tree on disk, and a plain nilearn + scikit-learn loop over the same files.

Three subjects, two sessions of two runs; faces and houses are shown in blocks, and region "yes" answers
``DELAY_S`` later, under head motion and drift that its confounds table tells. The loop knows nothing of
raypipe: it globs the files, cleans run by run with nilearn, and labels each volume by its own clock.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
from nilearn.interfaces.fmriprep import load_confounds
from nilearn.maskers import NiftiMasker

SPACE, TASK, T_R_S, DELAY_S = "MNI152NLin2009cAsym", "look", 2.0, 5.0
SHAPE, N_VOLUMES = (8, 7, 6), 80
AFFINE = np.array([[-3.0, 0, 0, 12], [0, 3, 0, -10], [0, 0, 3, -8], [0, 0, 0, 1]])
SUBJECTS, SESSIONS, RUNS = ("01", "02", "03"), ("a", "b"), ("1", "2")
BLOCK_S, PAUSE_S = 10.0, 6.0
N_ROI = 30  # voxels of each region


def make_tree(root: Path) -> Path:
    """root/prep (fMRIPrep's output), root/raw (events.tsv), root/rois; returns root."""
    for number, subject in enumerate(SUBJECTS):
        patterns = np.random.default_rng(number).normal(size=(2, N_ROI)) * 12
        for run_number, (session, run) in enumerate((s, r) for s in SESSIONS for r in RUNS):
            rng = np.random.default_rng([number, run_number])
            _run(root, f"sub-{subject}_ses-{session}_task-{TASK}_run-{run}", patterns, rng)
    _other_task_and_space(root)
    rois = root / "rois"
    rois.mkdir()
    for name, first in (("yes", 0), ("no", 150)):
        image = np.zeros(np.prod(SHAPE), np.uint8)
        image[first : first + N_ROI] = 1
        save(image.reshape(SHAPE), rois / f"{name}.nii.gz")
    return root


def _run(root: Path, stem: str, patterns: np.ndarray, rng: np.random.Generator) -> None:
    func = _func(root / "prep", stem)
    kinds = rng.permutation([0, 1] * 5)
    onsets = 4.0 + np.arange(len(kinds)) * (BLOCK_S + PAUSE_S)
    confounds = _confounds(rng)
    values = 800 + rng.normal(size=(int(np.prod(SHAPE)), N_VOLUMES)) * 10
    times = (np.arange(N_VOLUMES) + 0.5) * T_R_S
    for onset, kind in zip(onsets, kinds, strict=True):
        on = (times >= onset + DELAY_S) & (times < onset + DELAY_S + BLOCK_S)
        values[:N_ROI, on] += patterns[kind][:, np.newaxis]
    leak = confounds[["trans_x", "rot_z", "cosine00"]].to_numpy()
    values += rng.normal(size=(len(values), 3)) * 25 @ leak.T
    save(values.astype(np.float32).reshape(*SHAPE, N_VOLUMES), scan_of(func, stem))
    brain = np.ones(np.prod(SHAPE), np.uint8)
    brain[rng.integers(0, N_ROI, 2)] = 0  # masks of runs differ, as fMRIPrep's do
    save(brain.reshape(SHAPE), scan_of(func, stem, "brain_mask"))
    table = func / f"{stem}_desc-confounds_timeseries.tsv"
    confounds.to_csv(table, sep="\t", index=False, na_rep="n/a")
    table.with_suffix(".json").write_text(json.dumps({"trans_x": {"Description": "translation"}}))
    events = pd.DataFrame({"onset": onsets, "duration": BLOCK_S})
    events["trial_type"] = np.array(["face", "house"])[kinds]
    events["rating"] = np.where(kinds == 1, 4.0, 1.0) + np.arange(len(kinds)) % 2
    raw = _func(root / "raw", stem)
    events.to_csv(raw / f"{stem}_events.tsv", sep="\t", index=False)


def _confounds(rng: np.random.Generator) -> pd.DataFrame:
    """In fMRIPrep's columns; what is a difference in time has no value in the first row."""
    found: dict[str, Any] = {}
    for name in ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z"):
        found[name] = np.cumsum(rng.normal(size=N_VOLUMES)) * 0.1
    for name in ("csf", "white_matter", "global_signal"):
        found[name] = rng.normal(size=N_VOLUMES) * 3 + 500
    for name in list(found):
        found[f"{name}_derivative1"] = np.concatenate(([np.nan], np.diff(found[name])))
        found[f"{name}_power2"] = found[name] ** 2
        found[f"{name}_derivative1_power2"] = found[f"{name}_derivative1"] ** 2
    turns = np.pi * (np.arange(N_VOLUMES) + 0.5) / N_VOLUMES
    for k in (1, 2):
        found[f"cosine{k - 1:02d}"] = np.cos(k * turns)
    shaken = rng.choice(np.arange(20, N_VOLUMES), 4, replace=False)
    displacement = np.abs(rng.normal(size=N_VOLUMES)) * 0.05
    displacement[shaken] = 0.9
    found["framewise_displacement"] = np.concatenate(([np.nan], displacement[1:]))
    found["std_dvars"] = np.concatenate(([np.nan], np.full(N_VOLUMES - 1, 1.0)))
    return pd.DataFrame(found)


def _other_task_and_space(root: Path) -> None:
    """What a selection must leave out: it is no readable scan, so that taking it would be seen."""
    for subject in SUBJECTS:
        stem = f"sub-{subject}_ses-a_task-{TASK}_run-1"
        func = _func(root / "prep", stem)
        (func / f"{stem}_space-T1w_desc-preproc_bold.nii.gz").write_bytes(b"no scan")
        other = stem.replace(TASK, "rest")
        scan_of(func, other).write_bytes(b"no scan")


def _func(root: Path, stem: str) -> Path:
    subject, session = stem.split("_")[:2]
    folder = root / subject / session / "func"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def scan_of(func: Path, stem: str, what: str = "preproc_bold") -> Path:
    """A derivative in ``SPACE``."""
    return func / f"{stem}_space-{SPACE}_desc-{what}.nii.gz"


def save(values: np.ndarray, path: Path, affine: np.ndarray = AFFINE) -> None:
    """Write a NIfTI image; one of four dimensions has a TR."""
    image = nibabel.Nifti1Image(values, affine)
    if values.ndim == 4:
        image.header.set_zooms((3.0, 3.0, 3.0, T_R_S))
        image.header.set_xyzt_units("mm", "sec")
    nibabel.save(image, path)


def command(kind: str, root: Path, run_dir: Path, *more: str) -> list[str]:
    """``raypipe fmri roi`` or ``mvpa`` of that tree, in this process."""
    return [
        *("fmri", kind, "--bids-dir", str(root / "prep"), "--task", TASK, "--space", SPACE),
        *("--run-dir", str(run_dir), "--cache-dir", str(root / "cache"), "--runner", "local"),
        *(["--raw-dir", str(root / "raw"), "--delay-s", f"{DELAY_S:g}"] if kind == "mvpa" else []),
        *more,
    ]


def scans(root: Path, subject: str, sessions: Sequence[str] = SESSIONS) -> list[Path]:
    """The subject's scans in the order of sessions and runs."""
    stems = [f"sub-{subject}_ses-{s}_task-{TASK}_run-{r}" for s in sessions for r in RUNS]
    return [scan_of(_func(root / "prep", stem), stem) for stem in stems]


def region(root: Path, image: Any, paths: Sequence[Path]) -> nibabel.Nifti1Image:
    """The voxels of a region that are in the brain masks of all ``paths``."""
    values = np.asarray(nibabel.load(image).dataobj if isinstance(image, Path) else image) > 0
    for path in paths:
        brain = path.with_name(path.name.replace("preproc_bold", "brain_mask"))
        values = values & (np.asarray(nibabel.load(brain).dataobj) > 0)
    return nibabel.Nifti1Image(values.astype(np.uint8), AFFINE)


def nilearns(
    path: Path,
    mask: Any,
    strategy: Sequence[str] = (),
    load: Mapping[str, Any] | None = None,
    masker: type = NiftiMasker,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """(volumes left, voxels) cleaned by nilearn, and which volumes those are.

    strategy, load : of load_confounds; masker, options : of nilearn's masker
    """
    confounds, kept = None, None
    if strategy:
        confounds, kept = load_confounds(str(path), strategy=tuple(strategy), **(load or {}))
    fitted = masker(mask, t_r=T_R_S, **options)
    values = fitted.fit_transform(path, confounds=confounds, sample_mask=kept)
    return values, np.arange(N_VOLUMES) if kept is None else np.asarray(kept)


def labels_of(root: Path, path: Path, column: str = "trial_type") -> np.ndarray:
    """(N_VOLUMES,) what each volume answers to, None for nothing: by the clock, event by event."""
    stem = path.name.split("_space-")[0]
    events = pd.read_csv(_func(root / "raw", stem) / f"{stem}_events.tsv", sep="\t")
    found = np.full(N_VOLUMES, None, dtype=object)
    for volume in range(N_VOLUMES):
        middle = (volume + 0.5) * T_R_S - DELAY_S
        for _, event in events.iterrows():
            if event.onset <= middle < event.onset + event.duration:
                found[volume] = event[column]
    return found


def samples(
    root: Path,
    subject: str,
    image: Any,
    strategy: Sequence[str] = (),
    *,
    load: Mapping[str, Any] | None = None,
    column: str = "trial_type",
    sessions: Sequence[str] = SESSIONS,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(patterns, labels, runs) of the volumes that answer to something, each run cleaned by nilearn."""
    paths = scans(root, subject, sessions)
    mask = region(root, image, paths)
    parts, labels, runs = [], [], []
    for number, path in enumerate(paths):
        values, kept = nilearns(
            path, mask, strategy, load, detrend=True, standardize="zscore_sample"
        )
        shown = labels_of(root, path, column)[kept]
        on = np.array([one is not None for one in shown])
        parts.append(values[on])
        labels += list(shown[on])
        runs += [number] * int(on.sum())
    return np.vstack(parts), np.array(labels), np.array(runs)
