"""The planted subjects, held against nilearn and scikit-learn alone: what is planted is there, no more."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from nilearn.maskers import NiftiLabelsMasker, NiftiMasker
from sklearn.model_selection import LeaveOneGroupOut, cross_val_score
from sklearn.svm import LinearSVC

from raypipe.errors import ConfigError
from raypipe.fmri import planted
from raypipe.fmri.planted import EMPTY, PLANTED, PlantedFmriConfig, make_planted_subjects
from raypipe.read.bids import BidsQuery, find_runs
from raypipe.read.nifti import open_scan

SMALL = PlantedFmriConfig(subjects=2, runs=2, classes=("face", "house"), blocks=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_planted_subjects(tmp_path_factory.mktemp("planted"), PlantedFmriConfig(subjects=2))


def test_the_tree_is_read_as_fmriprep_s(data: Path) -> None:
    runs = find_runs(data, BidsQuery())
    assert [(run.subject, run.run) for run in runs] == [
        (s, r) for s in ("01", "02") for r in "1234"
    ]
    for run in runs:
        scan = open_scan(run.bold)
        assert run.mask and run.confounds and run.events
        assert scan.dtype == np.int16 and scan.scaled
        assert (scan.shape, scan.tr_s) == ((*planted.SHAPE, PlantedFmriConfig().n_volumes), 2.0)
    table = pd.read_csv(runs[0].confounds, sep="\t")
    assert np.isnan(table["framewise_displacement"][0])
    assert len(table) == PlantedFmriConfig().n_volumes


def test_regions_lie_apart_in_the_brain() -> None:
    anatomy = planted.find_anatomy()
    every = np.concatenate(list(anatomy.rois.values()))
    assert len(set(every.tolist())) == every.size
    assert set(anatomy.rois) == {*PLANTED, *EMPTY}
    assert min(len(voxels) for voxels in anatomy.rois.values()) >= 40
    mm = planted._centres_mm()[anatomy.brain]
    for voxels in anatomy.rois.values():  # both halves
        assert abs(mm[voxels, 0].mean()) < 1e-6 and (mm[voxels, 0] > 0).any()


def test_the_response_peaks_after_5_s() -> None:
    for t_r_s in (0.5, 1.0, 2.0):
        shape = planted.response(t_r_s)
        assert shape.sum() == pytest.approx(1)
        assert 4 <= np.argmax(shape) * t_r_s <= 6
        assert shape.min() < 0  # the undershoot


def test_noise_is_autocorrelated_and_shared_by_neighbours() -> None:
    cfg = replace(PlantedFmriConfig(), noise_percent=1.0, blocks=8)
    anatomy = planted.find_anatomy()
    noise = planted._noise(cfg, anatomy, np.random.default_rng(0))
    # Drift: a line and two slow cosines; without them the rest is AR(1).
    t = np.linspace(0, 1, cfg.n_volumes)
    slow = np.linalg.qr(np.stack([t**0, t, np.cos(np.pi * t), np.cos(2 * np.pi * t)], 1))[0]
    rest = noise - noise @ slow @ slow.T
    lag = (rest[:, 1:] * rest[:, :-1]).sum() / (rest**2).sum()
    assert lag == pytest.approx(cfg.autocorrelation, abs=0.05)
    assert rest.std() == pytest.approx(1.0, abs=0.05)
    pairs = anatomy.brain[1:] - anatomy.brain[:-1] == 1  # neighbours in z
    rest /= rest.std(axis=1, keepdims=True)
    near = (rest[1:] * rest[:-1]).mean(axis=1)[pairs].mean()
    far = (rest * np.roll(rest, 1000, axis=0)).mean(axis=1).mean()
    assert near > 0.15 > 0.05 > abs(far)


def _samples(data: Path, subject: str, roi: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Trial means of an ROI by nilearn, labels, runs."""
    atlas = nibabel.load(data / "atlas.nii.gz")
    region = nibabel.Nifti1Image(
        (np.asarray(atlas.dataobj) == roi).astype(np.uint8), atlas.affine, dtype=np.uint8
    )
    masker = NiftiMasker(region, detrend=True, standardize="zscore_sample", t_r=2.0, reports=False)
    patterns, labels, groups = [], [], []
    for run in find_runs(data, BidsQuery(subjects=(subject,))):
        motion = pd.read_csv(run.confounds, sep="\t")[list(planted.MOTION)].to_numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            series = masker.fit().transform(run.bold, confounds=motion)
        for onset, duration, kind in pd.read_csv(run.events, sep="\t").itertuples(index=False):
            first = int((onset + 4) / 2)
            patterns.append(series[first : first + int(duration / 2)].mean(0))
            labels.append(kind)
            groups.append(run.run)
    return np.array(patterns), np.array(labels), np.array(groups)


def test_planted_regions_tell_classes_apart_and_empty_ones_do_not(data: Path) -> None:
    names = pd.read_csv(data / "atlas.tsv", sep="\t").set_index("name")["index"]
    scores: dict[str, list[float]] = {}
    for subject in ("01", "02"):
        for name in (*PLANTED, *EMPTY):
            x, y, runs = _samples(data, subject, int(names[name]))
            score = cross_val_score(
                LinearSVC(C=1.0), x, y, groups=runs, cv=LeaveOneGroupOut()
            ).mean()
            scores.setdefault(name, []).append(score)
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    assert min(means[name] for name in PLANTED) > 0.55, means
    assert max(means[name] for name in EMPTY) < 0.45, means


def test_every_region_responds_to_stimuli(data: Path) -> None:
    """So an empty region is not a dead one."""
    run = find_runs(data, BidsQuery(subjects=("01",)))[0]
    masker = NiftiLabelsMasker(
        data / "atlas.nii.gz", standardize="psc", detrend=True, reports=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        series = masker.fit_transform(run.bold)
    on = np.zeros(len(series))
    for onset, duration, _ in pd.read_csv(run.events, sep="\t").itertuples(index=False):
        on[int(onset / 2) : int((onset + duration) / 2)] = 1
    expected = np.convolve(on, planted.response(2.0))[: len(on)]
    for column in series.T:
        assert np.corrcoef(column, expected)[0, 1] > 0.4


def test_the_same_data_are_made_once_and_others_anew(tmp_path: Path) -> None:
    scan = next((make_planted_subjects(tmp_path, SMALL)).rglob("*bold.nii.gz"))
    before, made = scan.read_bytes(), scan.stat().st_mtime_ns
    make_planted_subjects(tmp_path, SMALL)
    assert scan.stat().st_mtime_ns == made
    (tmp_path / "planted.json").unlink()  # as a crash would leave it
    make_planted_subjects(tmp_path, SMALL)
    assert scan.read_bytes() == before
    make_planted_subjects(tmp_path, replace(SMALL, seed=1))
    assert scan.read_bytes() != before
    assert json.loads((tmp_path / "planted.json").read_text())["planted"] == list(PLANTED)


def test_what_cannot_be_planted_is_refused() -> None:
    with pytest.raises(ConfigError, match="too few"):
        PlantedFmriConfig(subjects=1)
    with pytest.raises(ConfigError, match=r"1\.0 is not in 0"):
        PlantedFmriConfig(autocorrelation=1.0)
