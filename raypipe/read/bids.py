"""The runs of an fMRIPrep tree, found by BIDS entities in file names.

``<root>/sub-01/[ses-1/]func/sub-01_ses-1_task-x_run-1_space-S_desc-preproc_bold.nii.gz`` with its
brain mask and confounds beside it; events.tsv beside it or in the raw data set. Reading confounds and
events is ``confounds.py`` and ``events.py``; a plain table instead of a tree is ``runtable.py``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raypipe.errors import InputError, MissingInput
from raypipe.read.runfiles import RunFiles, bare, check_subjects, number_key, without_zeros

_SUFFIXES = (".nii.gz", ".nii")
NATIVE = "native"  # the space of a scan whose name tells none
_CONFOUNDS = ("desc-confounds_timeseries.tsv", "desc-confounds_regressors.tsv")  # from, before 20.2


@dataclass(frozen=True, kw_only=True)
class BidsQuery:
    """Which runs; an empty selection means all."""

    subjects: tuple[str, ...] = ()
    """Subjects, e.g. 01 02 or sub-01."""
    sessions: tuple[str, ...] = ()
    """Sessions, e.g. 1 or ses-1."""
    task: str | None = None
    """The task; needed where there are several."""
    runs: tuple[str, ...] = ()
    """Runs, e.g. 1 2; 01 is the same as 1."""
    space: str | None = None
    """Output space, e.g. MNI152NLin2009cAsym; native for scans whose name, or row of the table, tells none;
    needed where there are several."""
    desc: str = "preproc"
    """Which derivative of the scan."""


def entities(name: str) -> dict[str, str]:
    """``{"sub": "01", "task": "x", …}`` of a BIDS file name."""
    stem = name.split(".", 1)[0]
    return dict(part.split("-", 1) for part in stem.split("_") if "-" in part)


def find_runs(
    root: Path, query: BidsQuery, *, raw_root: Path | None = None
) -> tuple[RunFiles, ...]:
    """The runs below ``root`` that ``query`` asks for, in the order subject, session, task, run.

    raw_root : the data set with events.tsv, if not in ``root`` itself
    Raises MissingInput for an absent subject or no run at all, InputError where a task or a space
    must be chosen.
    """
    root = Path(root)
    subjects = tree_subjects(root)
    check_subjects(query.subjects, subjects, root)
    wanted = [bare(subject, "sub") for subject in query.subjects] or list(subjects)
    scans = [path for subject in wanted for path in _scans(root / f"sub-{subject}", query.desc)]
    chosen = [path for path in scans if _matches(entities(path.name), query)]
    _check_found(chosen, scans, query, root)
    _check_one_each(chosen, query)
    runs = [_run_files(path, root, raw_root) for path in chosen]
    return tuple(sorted(runs, key=_order))


def tree_subjects(root: Path) -> tuple[str, ...]:
    """The subjects that have a folder in ``root``. Raises MissingInput when it does not exist."""
    if not root.is_dir():
        raise MissingInput(
            f"folder {root} does not exist; give the fMRIPrep output, with sub-… in it"
        )
    found = (path.name[4:] for path in root.glob("sub-*") if path.is_dir())
    return tuple(sorted(found, key=number_key))


def _order(run: RunFiles) -> tuple[tuple[int, str], ...]:
    return tuple(number_key(key) for key in (run.subject, run.session, run.task, run.run))


def _scans(subject: Path, desc: str) -> list[Path]:
    """All bold images of the derivative in a subject's func folders."""
    folders = [*subject.glob("func"), *subject.glob("ses-*/func")]
    return sorted(
        path
        for folder in folders
        for suffix in _SUFFIXES
        for path in folder.glob(f"*_desc-{desc}_bold{suffix}")
    )


def _matches(found: dict[str, str], query: BidsQuery) -> bool:
    sessions = [bare(session, "ses") for session in query.sessions]
    runs = [without_zeros(bare(run, "run")) for run in query.runs]
    return (
        (not sessions or found.get("ses") in sessions)
        and (not runs or without_zeros(found.get("run", "")) in runs)
        and (query.task is None or found.get("task") == bare(query.task, "task"))
        and (query.space is None or found.get("space", NATIVE) == bare(query.space, "space"))
    )


def _check_found(
    chosen: Sequence[Path], scans: Sequence[Path], query: BidsQuery, root: Path
) -> None:
    """Every subject asked for has a run left."""
    if not scans:
        raise MissingInput(
            f"{root} holds no *_desc-{query.desc}_bold.nii.gz below sub-*/[ses-*/]func; "
            "give the fMRIPrep output folder, or another desc"
        )
    if not chosen:
        other = {"space": NATIVE}
        has = {
            key: sorted({entities(p.name).get(key, other.get(key, "")) for p in scans})
            for key in _KEYS
        }
        told = "; ".join(f"{key} {', '.join(filter(None, values))}" for key, values in has.items())
        raise MissingInput(f"no run in {root} matches; there is: {told}")
    left = {entities(path.name)["sub"] for path in chosen}
    for subject in (bare(subject, "sub") for subject in query.subjects):
        if subject not in left:
            raise MissingInput(
                f"subject {subject} has no run of that selection in {root}; it has: "
                + ", ".join(p.name for p in scans if entities(p.name).get("sub") == subject)
            )


_KEYS = ("ses", "task", "run", "space")


def _check_one_each(chosen: Sequence[Path], query: BidsQuery) -> None:
    """One task and one space, or the choice is not ours."""
    for key in ("task", "space"):
        values = sorted({entities(path.name).get(key, NATIVE) for path in chosen})
        if len(values) > 1:
            raise InputError(f"there are several {key}s, {', '.join(values)}; choose one by {key}")


def _run_files(bold: Path, root: Path, raw_root: Path | None) -> RunFiles:
    found = entities(bold.name)
    stem = re.sub(r"_desc-[A-Za-z0-9]+_bold\.nii(\.gz)?$", "", bold.name)
    plain = "_".join(part for part in stem.split("_") if part.split("-")[0] not in ("space", "res"))
    masks = [bold.with_name(f"{stem}_desc-brain_mask{suffix}") for suffix in _SUFFIXES]
    confounds = [bold.with_name(f"{plain}_{name}") for name in _CONFOUNDS]
    return RunFiles(
        subject=found["sub"],
        session=found.get("ses"),
        task=found.get("task"),
        run=found.get("run"),
        space=found.get("space"),
        bold=bold,
        mask=_first(masks),
        confounds=_first(confounds),
        events=_events(bold, [root] if raw_root is None else [root, Path(raw_root)]),
    )


def _events(bold: Path, roots: Sequence[Path]) -> Path | None:
    """The run's events.tsv, by the inheritance principle: in its own folder, else in the nearest above
    it, a file that names no other entity; of several the one that names most.

    roots : fMRIPrep's output, which holds ``bold``, then the raw data set
    """
    found = entities(bold.name).items()
    func = bold.parent.relative_to(roots[0])
    for root in roots:
        for folder in (root / func, *(root / above for above in func.parents)):
            tables = {path: entities(path.name).items() for path in folder.glob("*_events.tsv")}
            fitting = [path for path, named in sorted(tables.items()) if named <= found]
            if fitting:
                return max(fitting, key=lambda path: len(tables[path]))
    return None


def _first(paths: Sequence[Path]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)
