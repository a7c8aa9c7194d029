"""`fmri mvpa --weight-maps`: scikit-learn's weights, Haufe's patterns, and the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import nibabel
import numpy as np
import pytest
from mvpa_kit import design_of
from run_kit import SHAPE, make_data, mvpa_config, patterns
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from raypipe.errors import InputError, StoreCorrupt
from raypipe.fmri import inputs as inputs_module
from raypipe.fmri.commands import mvpa
from raypipe.fmri.inputs import look_at
from raypipe.fmri.masks import Grid
from raypipe.fmri.mvpa import EstimatorConfig, MvpaConfig, Weights
from raypipe.fmri.mvpa.estimators import maps_at_most
from raypipe.fmri.mvpa.weights import weight_maps
from raypipe.fmri.report import write_report
from raypipe.fmri.report.brain import read_map, read_maps
from raypipe.fmri.rois import wanted_rois
from raypipe.fmri.series import Subject
from raypipe.fmri.units import Target, Unit
from raypipe.fmri.weight_files import save_weights
from raypipe.runner import LocalRunner

pytestmark = pytest.mark.usefixtures("no_page")

NAME = "sub-01_roi-yes_target-all"


def volume(run_dir: Path, name: str) -> np.ndarray:
    return np.asarray(nibabel.load(run_dir / "maps" / f"{name}.nii.gz").dataobj, np.float64)


def test_maps_are_scikit_learns_weights_and_their_patterns(tmp_path: Path) -> None:
    table = make_data(tmp_path / "data")
    plain = mvpa_config(table, tmp_path / "run")
    assert mvpa(plain, LocalRunner()).computed == 4
    assert not list((plain.run_dir / "maps").glob("sub-*"))
    cfg = replace(plain, weight_maps=True)
    assert mvpa(cfg, LocalRunner()).computed == 4, "a changed option"
    values, labels, _ = patterns(table, "01", "yes")
    scaled = StandardScaler().fit_transform(values.astype(np.float64))
    weights = SVC(kernel="linear").fit(scaled, labels).coef_[0]
    pattern = np.cov(scaled.T) @ weights / np.var(scaled @ weights, ddof=1)
    for kind, theirs in (("weights", weights), ("pattern", pattern)):
        ours = volume(cfg.run_dir, f"{NAME}_{kind}").ravel()
        np.testing.assert_allclose(ours[:20], theirs, atol=2e-3 * np.abs(theirs).max())
        assert np.isnan(ours[20:]).all()
    told = json.loads((cfg.run_dir / "maps" / f"{NAME}_pattern.json").read_text())
    assert told["volumes"] == ["dog over cat"]
    assert mvpa(cfg, LocalRunner()).computed == 0
    for path in [*cfg.run_dir.glob("maps/sub-02*"), *cfg.run_dir.glob("maps/sub-01_roi-no*")]:
        path.unlink()
    page = write_report(cfg.run_dir).read_text()
    assert "sub-01 yes: all, pattern of dog over cat" in page
    assert page.count('alt="Brain map: sub-01') == 1, "weights are named, not drawn"
    assert f"{NAME}_weights.nii.gz" in page
    assert mvpa(plain, LocalRunner()).computed == 4
    assert not list((plain.run_dir / "maps").glob("sub-01_roi-yes*")), "older maps go"


def test_maps_are_planned_for(tmp_path: Path) -> None:
    cfg = mvpa_config(make_data(tmp_path / "data", ("01",)), tmp_path / "run")
    for asked, n_maps in ((False, 0), (True, 1)):
        found = look_at(replace(cfg, weight_maps=asked), "01", wanted_rois(cfg), cfg.targets())
        assert {facts.n_maps for _, facts in found.units} == {n_maps}


@pytest.mark.parametrize(
    "estimator", ["svc", "logistic", "ridge_classifier", "lda", "sklearn.svm.NuSVC"]
)
@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_as_many_maps_are_planned_as_scikit_learn_makes(estimator: str, n_classes: int) -> None:
    """Five classes have ten pairs."""
    params = ("kernel=linear",) if estimator.endswith("NuSVC") else ()
    model = EstimatorConfig(estimator=estimator, params=params)
    labels = np.tile([f"c{n}" for n in range(n_classes)], 8)
    design = design_of(labels, np.repeat(np.arange(8), n_classes))
    values = np.random.default_rng(0).normal(size=(len(labels), 6))
    made = np.atleast_2d(model.build().fit(values, labels).coef_)
    assert maps_at_most(model, n_classes) == len(made)
    names = weight_maps(values, design, MvpaConfig(model=model)).names
    assert len(names) == len(made), "each has its name"


def test_many_classes_are_planned_by_estimator(tmp_path: Path) -> None:
    """62 have 1,891 pairs."""
    facts = {
        estimator: inputs_module._unit_facts(
            mvpa_config(
                tmp_path, tmp_path, weight_maps=True,
                mvpa=MvpaConfig(model=EstimatorConfig(estimator=estimator)),
            ),
            Target(name="all"),
            design_of(np.array([f"c{n:02}" for n in range(62)] * 2), np.repeat([0, 1], 62)),
        )
        for estimator in ("svc", "ridge_classifier")
    }  # fmt: skip
    assert {name: one.n_maps for name, one in facts.items()} == {
        "svc": 1891,
        "ridge_classifier": 62,
    }


def test_a_model_without_weights_is_told(tmp_path: Path) -> None:
    model = EstimatorConfig(estimator="sklearn.neighbors.KNeighborsClassifier")
    cfg = mvpa_config(
        make_data(tmp_path / "data", ("01",)),
        tmp_path / "run",
        weight_maps=True,
        mvpa=MvpaConfig(model=model, scores=("accuracy",)),
    )
    with pytest.raises(InputError, match="2 of 2 units failed"):
        mvpa(cfg, LocalRunner())
    record = json.loads((cfg.run_dir / "units" / f"{NAME}.json").read_text())
    assert "has no weights; choose a linear one" in record["reason"]


class _Scan:
    shape, affine = (*SHAPE, 9), np.diag([3.0, 3.0, 3.0, 1.0])


class _Regions:
    voxels: ClassVar[dict[str, Any]] = {"V1": np.arange(4, 10)}


class _Run:
    space = "MNI"


def test_several_decisions_are_volumes_with_names(tmp_path: Path) -> None:
    subject = Subject(runs=(_Run(),), scans=(_Scan(),), regions=(_Regions(),), t_r_s=None)  # type: ignore[arg-type]
    values = np.random.default_rng(0).normal(size=(3, 6))
    names = ("a over b", "a over c", "b over c")
    found = Weights(names=names, weights=values, patterns=-values)
    unit = Unit(subject="01", roi="V1", target="all")
    files = save_weights(tmp_path, unit, subject, found)
    assert [path.name.rsplit("_", 1)[1] for path in files] == [
        *("pattern.nii.gz", "pattern.json", "weights.nii.gz", "weights.json")
    ]
    image = nibabel.load(files[0])
    assert Grid.of(image).same_as(Grid.of(_Scan()))
    assert image.shape == (*SHAPE, 3)
    maps = read_maps(files[0])
    assert [one.title for one in maps] == [f"sub-01 V1: all, pattern: {name}" for name in names]
    for one, expected in zip(maps, -values, strict=True):
        np.testing.assert_allclose(np.asarray(one.image.dataobj).ravel()[4:10], expected, rtol=1e-6)
        assert one.standard
    with pytest.raises(StoreCorrupt, match="one volume"):
        read_map(files[0])
    assert save_weights(tmp_path, unit, subject, None) == []
    assert not list((tmp_path / "maps").iterdir())
