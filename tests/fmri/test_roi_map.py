"""Group scores painted on their regions: on which voxels, of which score, and what goes with them."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from raypipe.fmri.config import MvpaJobConfig
from raypipe.fmri.planted import PlantedFmriConfig, make_planted_subjects
from raypipe.fmri.roi_map import save_roi_maps
from raypipe.read.bids import BidsQuery

DATA = PlantedFmriConfig(subjects=2, runs=2, classes=("face", "house"), blocks=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_planted_subjects(tmp_path_factory.mktemp("data"), DATA)


def _rows(**means: float) -> list[dict]:
    return [
        {"roi": roi, "target": "all", "score": score, "mean": mean + extra, "chance": 0.5,
         "subjects": {"02": 0.5}}
        for roi, mean in means.items()
        for score, extra in (("roc_auc", 0.1), ("accuracy", 0.0))
    ]  # fmt: skip


def _cfg(data: Path, run_dir: Path, **kw) -> MvpaJobConfig:
    named = {"atlas": str(data / "atlas.nii.gz"), "atlas_names": data / "atlas.tsv", **kw}
    query = BidsQuery(subjects=("99", "02"))  # a subject that is not there is another's matter
    return MvpaJobConfig(run_dir=run_dir, bids_dir=data, delay_s=4.0, query=query, **named)


def test_each_region_has_its_mean_accuracy(data: Path, tmp_path: Path) -> None:
    old = tmp_path / "maps" / "group_target-old_accuracy_roi.nii.gz"
    old.parent.mkdir()
    old.write_bytes(b"")
    (path,) = save_roi_maps(_cfg(data, tmp_path), _rows(occipital=0.9, motor=0.45))
    assert not old.exists()
    assert path.name == "group_target-all_accuracy_roi.nii.gz"
    image, atlas = nibabel.load(path), nibabel.load(data / "atlas.nii.gz")
    np.testing.assert_allclose(image.affine, atlas.affine)
    values, labels = image.get_fdata(), np.asarray(atlas.dataobj)
    names = [line.split("\t") for line in (data / "atlas.tsv").read_text().splitlines()[1:]]
    number = {name: int(index) for index, name in names}
    np.testing.assert_allclose(values[labels == number["occipital"]], 0.9, rtol=1e-6)
    np.testing.assert_allclose(values[labels == number["motor"]], 0.45, rtol=1e-6)
    painted = np.isin(labels, [number["occipital"], number["motor"]])
    assert np.isnan(values[~painted]).all()
    told = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
    assert (told["chance"], told["score"]) == (0.5, "accuracy")
    assert told["space"] == "MNI152NLin2009cAsym"


def test_regions_of_each_subjects_own_have_no_common_map(data: Path, tmp_path: Path) -> None:
    own = _cfg(data, tmp_path, atlas=None, atlas_names=None, roi=("V1=masks/{subject}.nii.gz",))
    assert save_roi_maps(own, _rows(V1=0.9)) == []


def test_spheres_that_overlap_show_the_higher(data: Path, tmp_path: Path) -> None:
    cfg = _cfg(data, tmp_path, atlas=None, atlas_names=None, sphere=("a=0,-20,10", "b=8,-20,10"))
    (path,) = save_roi_maps(cfg, _rows(a=0.9, b=0.6))
    values = nibabel.load(path).get_fdata()
    (low,) = save_roi_maps(cfg, _rows(a=0.6, b=0.9))
    other = nibabel.load(low).get_fdata()
    both = (values == np.float32(0.9)) & (other == np.float32(0.9))
    assert both.any()
    assert ((values == np.float32(0.9)) & (other == np.float32(0.6))).any()
