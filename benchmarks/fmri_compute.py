"""Contenders of benchmarks/fmri.py that compute on series in memory: cleaning, permutation tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from fmri_turn import Child

Spec = dict[str, Any]

_CLEANING = {"detrend": True, "standardize": "zscore_sample", "filter": "butterworth"}
LOW_PASS_HZ, HIGH_PASS_HZ, T_R_S = 0.1, 0.01, 2.0
N_CONFOUNDS = 24
CHECKED = 500  # voxels that are compared with nilearn's float64 answer


def our_clean(child: Child, spec: Spec) -> None:
    """``raypipe.fmri.clean`` with its kernels compiled and loaded."""
    import scipy.linalg
    import scipy.signal

    from raypipe.fmri.clean import CleanConfig, clean, kernels

    assert scipy and kernels  # which `clean` imports when it needs them
    series, confounds = _series(spec)
    config = CleanConfig(
        **_CLEANING, low_pass_hz=LOW_PASS_HZ, high_pass_hz=HIGH_PASS_HZ, t_r_s=T_R_S
    )
    out = np.empty_like(series)
    child.mark("imported")
    began = time.perf_counter()
    clean(series, config, confounds=confounds, threads=spec["threads"], out=out)
    child.mark("answered", seconds=time.perf_counter() - began)
    np.save(spec["answer"], out[:: _step(spec)])


def nilearn_clean(child: Child, spec: Spec) -> None:
    """``nilearn.signal.clean`` on (volumes, voxels) float32, as its maskers hold it."""
    from nilearn.signal import clean

    series, confounds = _series(spec)
    child.mark("imported")
    how = {"low_pass": LOW_PASS_HZ, "high_pass": HIGH_PASS_HZ, "t_r": T_R_S, **_CLEANING}
    began = time.perf_counter()
    clean(series.T, confounds=confounds, **how)
    child.mark("answered", seconds=time.perf_counter() - began)
    checked = series[:: _step(spec)].T.astype(np.float64)
    np.save(spec["answer"], clean(checked, confounds=confounds, **how).T)


def _step(spec: Spec) -> int:
    return max(1, int(spec["voxels"]) // CHECKED)


def _series(spec: Spec) -> tuple[np.ndarray, np.ndarray]:
    """(voxels, volumes) float32 around 1000 with drift, and (volumes, 24) confounds."""
    rng = np.random.default_rng(0)
    n, t = spec["voxels"], spec["volumes"]
    series = rng.standard_normal((n, t), np.float32)
    series *= 15
    series += rng.uniform(700, 1300, (n, 1)).astype(np.float32)
    series += rng.normal(0, 20, (n, 1)).astype(np.float32) * np.linspace(-1, 1, t, dtype=np.float32)
    return series, np.cumsum(rng.standard_normal((t, N_CONFOUNDS)), axis=0)


def our_permutations(child: Child, spec: Spec) -> None:
    """``decode`` with ``permutations``; the labels as they are were decoded once before."""
    from raypipe.fmri.mvpa import EstimatorConfig, MvpaConfig, decode

    patterns, design = _samples(spec)
    score = "accuracy" if design.is_classes else "r"
    model = EstimatorConfig(estimator=spec["estimator"], alpha=_alpha(spec))

    def run(n: int) -> np.ndarray:
        config = MvpaConfig(model=model, scores=(score,), n_permutations=n, exchange="sample")
        return decode(patterns, design, config).null[score]

    run(1)
    child.mark("imported")
    began = time.perf_counter()
    null = run(spec["permutations"])
    child.mark("answered", seconds=(time.perf_counter() - began) / spec["permutations"])
    np.save(spec["answer"], null)


def refit_permutations(child: Child, spec: Spec) -> None:
    """The same permutations; scaler and model are fitted anew in every fold of every one."""
    from scipy.stats import pearsonr
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import LeaveOneGroupOut
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    patterns, design = _samples(spec)
    labels, svc = design.encoded(), spec["estimator"] == "svc"
    drawn = _drawn(spec, design)
    child.mark("imported")
    began, null = time.perf_counter(), []
    for rows in drawn:
        permuted, scores = labels[rows], []
        for train, test in LeaveOneGroupOut().split(patterns, permuted, design.runs):
            model = SVC(kernel="linear") if svc else Ridge(alpha=_alpha(spec))
            fitted = make_pipeline(StandardScaler(), model).fit(patterns[train], permuted[train])
            found = fitted.predict(patterns[test])
            true = permuted[test]
            scores.append((found == true).mean() if svc else pearsonr(found, true).statistic)
        null.append(np.mean(scores))
    child.mark("answered", seconds=(time.perf_counter() - began) / len(drawn))
    np.save(spec["answer"], null)


def gram_permutations(child: Child, spec: Spec) -> None:
    """scikit-learn's SVC on one Gram matrix a fold: what our own solver is held against."""
    from sklearn.model_selection import LeaveOneGroupOut
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    patterns, design = _samples(spec)
    labels, drawn = design.encoded(), _drawn(spec, design)
    child.mark("imported")
    began = time.perf_counter()
    null = np.zeros(len(drawn))
    folds = list(LeaveOneGroupOut().split(patterns, labels, design.runs))
    for train, test in folds:
        scaler = StandardScaler().fit(patterns[train])
        own, other = scaler.transform(patterns[train]), scaler.transform(patterns[test])
        gram, held = own @ own.T, other @ own.T
        for k, rows in enumerate(drawn):
            permuted = labels[rows]
            model = SVC(kernel="precomputed").fit(gram, permuted[train])
            null[k] += (model.predict(held) == permuted[test]).mean() / len(folds)
    child.mark("answered", seconds=(time.perf_counter() - began) / len(drawn))
    np.save(spec["answer"], null)


def _samples(spec: Spec) -> tuple[np.ndarray, Any]:
    """(n, voxels) patterns in which two classes, or numbers, weakly show; runs of equal length."""
    from raypipe.fmri.mvpa import design_of_volumes

    rng = np.random.default_rng(0)
    n, runs = spec["samples"], 12
    sign = np.tile([-1.0, 1.0], n // 2)
    patterns = rng.standard_normal((n, spec["voxels"]))
    patterns += 0.05 * np.outer(sign, rng.standard_normal(spec["voxels"]))
    labels = np.where(sign > 0, "face", "house")
    if spec["estimator"] != "svc":
        labels = sign + rng.standard_normal(n)
    return patterns, design_of_volumes(labels, np.arange(n) * runs // n, delay_volumes=0)


def _drawn(spec: Spec, design: Any) -> np.ndarray:
    """The permutations that ``decode`` makes."""
    from raypipe.fmri.mvpa.permute import permutations

    return permutations(design, spec["permutations"], exchange="sample", seed=0)


def _alpha(spec: Spec) -> float:
    return float(spec["voxels"])  # about the trace over the rank of z-scored patterns


CLEANING: dict[str, Callable[[Child, Spec], None]] = {
    "our_clean": our_clean,
    "nilearn_clean": nilearn_clean,
}
DECODING: dict[str, Callable[[Child, Spec], None]] = {
    "our_permutations": our_permutations,
    "refit_permutations": refit_permutations,
    "gram_permutations": gram_permutations,
}
