"""What is said while units are computed comes into their records: ours, and what libraries warn of."""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from raypipe.errors import RaypipeWarning
from raypipe.fmri.work import Notes


def test_a_fit_that_did_not_converge_is_noted_once() -> None:
    rng, notes = np.random.default_rng(0), Notes()
    for _ in range(3):
        with notes.listening():
            LogisticRegression(max_iter=1).fit(rng.normal(size=(40, 30)), np.arange(40) % 2)
    (told,) = notes.warnings
    assert told.startswith(f"{ConvergenceWarning.__name__}: lbfgs failed to converge")
    assert len(told) <= 200


def test_ours_are_noted_in_full_and_those_about_code_are_not() -> None:
    notes, long = Notes(), "one " * 100 + "end"
    with notes.listening():
        for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning):
            warnings.warn("old", kind, stacklevel=1)
        for number in range(3):  # another number each time, from one line
            warnings.warn(f"rcond {number}", RuntimeWarning, stacklevel=1)
            warnings.warn(f"fold {number}", RaypipeWarning, stacklevel=1)
        warnings.warn(long, RaypipeWarning, stacklevel=1)
    assert notes.warnings == ["RuntimeWarning: rcond 0", "fold 0", "fold 1", "fold 2", long]
