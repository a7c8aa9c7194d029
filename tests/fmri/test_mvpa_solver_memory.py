"""Matrices that a fit holds where they are most of it, SciPy's own included: the peak of a real process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from raypipe.fmri.mvpa import EstimatorConfig
from raypipe.fmri.mvpa.estimators import solver_squares

PATTERNS = 12  # of a class
LDA = "sklearn.discriminant_analysis.LinearDiscriminantAnalysis"
QDA = "sklearn.discriminant_analysis.QuadraticDiscriminantAnalysis"
LOGISTIC = "sklearn.linear_model.LogisticRegression"
# estimator, params, voxels, classes: matrices of 1 to 11 MiB
CASES = [
    (LOGISTIC, "solver=newton-cholesky max_iter=1", 1200, 2),
    (LOGISTIC, "solver=newton-cholesky max_iter=1", 400, 3),
    (LDA, "solver=svd store_covariance=true", 1200, 2),
    (QDA, "solver=eigen shrinkage=auto", 900, 2),
    (QDA, "solver=eigen shrinkage=0.5", 900, 3),
]

# Each model is fitted small first: what loads with it, and the BLAS's buffers, are then there.
FIT_EACH = """
import json, sys
from pathlib import Path
import numpy as np
from raypipe.fmri.mvpa import EstimatorConfig
def at(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024
rng, each, found = np.random.default_rng(0), int(sys.argv[1]), []
for estimator, params, voxels, n_classes in json.loads(sys.argv[2]):
    labels = np.arange(each * n_classes) % n_classes
    patterns = rng.normal(size=(len(labels), voxels))
    make = EstimatorConfig(estimator=estimator, params=tuple(params.split())).build
    make().fit(patterns[:, :100].copy(), labels)
    Path("/proc/self/clear_refs").write_text("5")  # the mark begins anew
    before = at("VmRSS")
    make().fit(patterns, labels)
    found.append((at("VmHWM") - before) / (8 * voxels**2))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def held() -> dict[str, float]:
    """Matrices of voxels x voxels above what the process had before the fit, by case."""
    # Freed blocks go back at once, so that none of a case is there for the next one.
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    told = json.dumps(CASES)
    command = [sys.executable, "-W", "ignore", "-c", FIT_EACH, str(PATTERNS), told]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return dict(zip(map(str, CASES), json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].split('.')[-1]} {case[1]}")
def test_a_fit_holds_as_many_matrices_as_are_planned(
    case: tuple[str, str, int, int], held: dict[str, float]
) -> None:
    estimator, params, voxels, n_classes = case
    model = EstimatorConfig(estimator=estimator, params=tuple(params.split()))
    planned = solver_squares(model, n_classes)
    # In matrices: five copies of the patterns, which are planned for by themselves, and BLAS's buffers.
    beside = (5 * 8 * PATTERNS * n_classes * voxels + (2 << 20)) / (8 * voxels**2)
    assert 0.7 * planned < held[str(case)] <= 1.03 * planned + beside


def test_a_decomposition_without_covariances_holds_none() -> None:
    for params in ("", "solver=svd"):
        assert solver_squares(EstimatorConfig(estimator=LDA, params=tuple(params.split())), 3) == 0
