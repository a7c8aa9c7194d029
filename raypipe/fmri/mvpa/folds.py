"""Which samples train and which test: whole runs by default, and a warning where runs are mixed.

Volumes of one run are neighbours in time: noise that lasts longer than a TR is in both sides of a fold
that divides a run, and a model that learns it scores above chance where there is nothing to decode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold, KFold, LeaveOneGroupOut, StratifiedKFold

from raypipe.errors import InputError
from raypipe.fmri.mvpa.config import MvpaConfig
from raypipe.fmri.mvpa.design import Design, Rows


@dataclass(frozen=True, eq=False, kw_only=True)
class Fold:
    """train, test : sample numbers, rising, disjoint."""

    train: Rows
    test: Rows


def make_folds(design: Design, config: MvpaConfig) -> tuple[Fold, ...]:
    """The folds that ``config.cv`` names; raises InputError when there are too few runs or samples."""
    n_runs = len(np.unique(design.runs))
    need = {"leave_one_run_out": 2, "runs": config.n_folds, "shuffled": 1}[config.cv]
    if n_runs < need:
        raise InputError(
            f"the design has {n_runs} run(s), cv {config.cv} needs {need}; measure more runs, or choose "
            "fewer folds"
        )
    if config.cv == "shuffled" and len(design) < config.n_folds:
        raise InputError(
            f"{len(design)} samples cannot be shuffled into {config.n_folds} folds; give fewer"
        )
    labels = design.encoded()
    groups = None if config.cv == "shuffled" else design.runs
    parts = _splitter(design, config).split(np.zeros((len(design), 1)), labels, groups)
    folds = tuple(Fold(train=np.sort(a), test=np.sort(b)) for a, b in parts)
    check_folds(folds, design)
    return folds


def _splitter(
    design: Design, config: MvpaConfig
) -> LeaveOneGroupOut | GroupKFold | StratifiedKFold | KFold:
    if config.cv == "leave_one_run_out":
        return LeaveOneGroupOut()
    if config.cv == "runs":
        return GroupKFold(config.n_folds)
    kind = StratifiedKFold if design.is_classes else KFold
    return kind(config.n_folds, shuffle=True, random_state=config.seed)


def check_folds(folds: Sequence[Fold], design: Design) -> None:
    """Raises InputError for a fold that tests on training samples, or on a class it was not taught."""
    for number, fold in enumerate(folds):
        if np.intersect1d(fold.train, fold.test).size:
            raise InputError(f"fold {number} tests on samples it trains on; make them disjoint")
        if not fold.train.size or not fold.test.size:
            raise InputError(f"fold {number} has no training or no test sample; choose other folds")
        if not design.is_classes:
            continue
        untaught = np.setdiff1d(design.labels[fold.test], design.labels[fold.train])
        if untaught.size or len(np.unique(design.labels[fold.train])) < 2:
            told = f"class {str(untaught[0])!r}" if untaught.size else "a second class"
            raise InputError(
                f"fold {number} has no training sample of {told}; every class must be in two runs or more"
            )


def mixed_runs(folds: Sequence[Fold], runs: Rows) -> Rows:
    """The runs that some fold has both in training and in test."""
    both = [np.intersect1d(runs[fold.train], runs[fold.test]) for fold in folds]
    return np.unique(np.concatenate([np.empty(0, np.int64), *both]))


def mixing_danger(
    folds: Sequence[Fold], design: Design, patterns: NDArray[np.float64]
) -> str | None:
    """What is wrong with folds that mix runs, with the measured correlation of neighbours; else None."""
    mixed = mixed_runs(folds, design.runs)
    if mixed.size == 0:
        return None
    r = neighbour_correlation(patterns, design.runs)
    return (
        f"folds mix runs: {mixed.size} of {len(np.unique(design.runs))} runs are in training and in "
        f"test of one fold, and neighbouring samples of a run correlate by {r:.2f}; scores count "
        "shared noise as decoding and are too high: hold out whole runs, cv leave_one_run_out"
    )


def neighbour_correlation(patterns: NDArray[np.float64], runs: Rows) -> float:
    """Lag-1 autocorrelation within runs, over all voxels. patterns : (n, n_voxels), in time order."""
    product, square = 0.0, 0.0
    for run in np.unique(runs):
        own = patterns[runs == run]
        own = own - own.mean(axis=0)
        product += float((own[1:] * own[:-1]).sum())
        square += float((own**2).sum())
    return product / square if square > 0 else 0.0
