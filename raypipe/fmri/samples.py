"""Labels or events of a subject's runs -> the design of one target, and which volumes are of one run.

Volumes are counted over all scans of a subject put end to end. The design itself is ``mvpa.sampling``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from raypipe.errors import ConfigError, InputError, MissingInput
from raypipe.fmri.config import MvpaJobConfig
from raypipe.fmri.mvpa import Design, design_of_events, design_of_volumes
from raypipe.fmri.rois import filled
from raypipe.fmri.units import Target
from raypipe.read.events import Events, read_events
from raypipe.read.labels import VolumeLabels, read_labels
from raypipe.read.runfiles import RunFiles

_NO_NUMBER = ("", "n/a", "nan", "na")


def design_of(
    cfg: MvpaJobConfig,
    target: Target,
    runs: Sequence[RunFiles],
    n_volumes: Sequence[int],
    t_r_s: float | None,
) -> Design:
    """The samples of ``target``. n_volumes : of each run; t_r_s : needed for events or a delay."""
    column = target.column or cfg.label_column
    if cfg.labels is None:
        design = _of_events(cfg, column, runs, n_volumes, t_r_s)
    else:
        design = _of_labels(cfg, column, runs, n_volumes, t_r_s)
    if target.column is not None:
        return _as_numbers(design, target.column)
    return design.of_classes(target.classes) if target.classes else design


def runs_within(cfg: MvpaJobConfig, run: RunFiles, n_volumes: int) -> NDArray[np.int64]:
    """(n_volumes,) the number of the run each volume of one scan is of, 0 first."""
    if cfg.labels is None:
        return np.zeros(n_volumes, np.int64)
    return _numbered(_table(cfg, cfg.label_column, run, n_volumes).runs)


def has_onsets(cfg: MvpaJobConfig, run: RunFiles) -> bool:
    """Whether rows of the run's own label table may be trials."""
    return (
        cfg.labels is not None
        and read_labels(label_files(cfg, run), cfg.label_column).onsets is not None
    )


def label_files(cfg: MvpaJobConfig, run: RunFiles) -> Path:
    """The file that decides the labels of ``run``. Raises MissingInput when it has none."""
    if cfg.labels is not None:
        return Path(filled(cfg.labels, run))
    if run.events is None:
        raise MissingInput(
            f"{run.name} has no events.tsv beside {run.bold}; give --raw-dir, --labels, or an events "
            "column"
        )
    return run.events


def _of_labels(
    cfg: MvpaJobConfig,
    column: str | None,
    runs: Sequence[RunFiles],
    n_volumes: Sequence[int],
    t_r_s: float | None,
) -> Design:
    labels, numbers, first = [], [], 0
    trials: dict[bool, RunFiles] = {}
    for run, n in zip(runs, n_volumes, strict=True):
        table = _table(cfg, column, run, n)
        trials[are_trials(table, t_r_s)] = run
        within = _numbered(table.runs)
        labels.append(table.labels)
        numbers.append(within + first)
        first += int(within.max()) + 1
    _check_trials(cfg, trials)
    return design_of_volumes(
        np.concatenate(labels),
        np.concatenate(numbers),
        delay_volumes=_delay_volumes(cfg, t_r_s),
        rest=(*cfg.rest, *_NO_NUMBER),
        each=cfg.each,
        trials=True in trials,
    )


def are_trials(table: VolumeLabels, t_r_s: float | None) -> bool:
    """Whether a row is a trial, as of betas: it says when it began, and rows are not just a TR apart."""
    if table.onsets is None:
        return False
    steps = [np.diff(table.onsets[table.runs == run]) for run in np.unique(table.runs)]
    apart = np.concatenate(steps)
    volumes = t_r_s is not None and apart.size > 0 and np.allclose(apart, t_r_s, atol=0.01 * t_r_s)
    return not volumes


def _check_trials(cfg: MvpaJobConfig, trials: Mapping[bool, RunFiles]) -> None:
    """trials : whether its rows are -> a run. Raises InputError for both, ConfigError for a delay."""
    if len(trials) == 2:
        raise InputError(
            f"labels of {trials[True].name} have a trial a row (column onset), those of "
            f"{trials[False].name} a volume a row; give all runs alike"
        )
    if True in trials and cfg.delay_s:
        raise ConfigError(
            f"delay_s {cfg.delay_s} is of volumes, labels of {trials[True].name} have a trial a row "
            "(column onset); give --delay-s 0 for betas, or take that column out if rows are volumes"
        )


def _table(cfg: MvpaJobConfig, column: str | None, run: RunFiles, n_volumes: int) -> VolumeLabels:
    path = label_files(cfg, run)
    table = read_labels(path, column)
    if len(table.labels) != n_volumes:
        raise InputError(
            f"labels {path} have {len(table.labels)} rows, {run.name} has {n_volumes} volumes; give one "
            "row a volume"
        )
    return table


def _numbered(names: NDArray[np.str_]) -> NDArray[np.int64]:
    """Numbers from 0 in the order of appearance."""
    _, first, number = np.unique(names, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[number].astype(np.int64)


def _delay_volumes(cfg: MvpaJobConfig, t_r_s: float | None) -> int:
    """As ``design_of_events``: a volume is of what was on ``delay_s`` before the middle of it."""
    delay_s = cfg.delay_s or 0.0
    if delay_s == 0:
        return 0
    return max(0, math.ceil(delay_s / known_t_r(t_r_s) - 0.5 - 1e-9))  # less what division rounds


def _of_events(
    cfg: MvpaJobConfig,
    column: str | None,
    runs: Sequence[RunFiles],
    n_volumes: Sequence[int],
    t_r_s: float | None,
) -> Design:
    tables = [read_events(label_files(cfg, run), column or "trial_type") for run in runs]
    return design_of_events(
        [without_rest(table, cfg.rest) for table in tables],
        list(n_volumes),
        t_r_s=known_t_r(t_r_s),
        delay_s=cfg.delay_s or 0.0,
        each=cfg.each,
    )


def without_rest(events: Events, rest: Sequence[str]) -> Events:
    """The events but those of the types in ``rest``, or of no type."""
    kept = ~np.isin(events.trial_type, [*rest, *_NO_NUMBER])
    return Events(
        onset_s=events.onset_s[kept],
        duration_s=events.duration_s[kept],
        trial_type=events.trial_type[kept],
    )


def known_t_r(t_r_s: float | None) -> float:
    """Seconds a volume; raises InputError where nothing tells."""
    if t_r_s is None:
        raise InputError("the scan's header tells no TR; give --t-r-s, seconds a volume")
    return t_r_s


def _as_numbers(design: Design, column: str) -> Design:
    try:
        return replace(design, labels=design.labels.astype(np.float64))
    except ValueError as error:
        raise InputError(f"column {column} is no column of numbers: {error}; correct it") from None
