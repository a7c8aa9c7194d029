"""A searchlight's series are those of ``fmri mvpa``, from the cache or in place, scrubbed or whole."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from run_kit import N_RUNS, N_VOLUMES, make_data

from raypipe.fmri import series as series_module
from raypipe.fmri.inputs import runs_of
from raypipe.fmri.rois import Regions, wanted_rois
from raypipe.fmri.searchlight import runs as runs_module
from raypipe.fmri.searchlight.job import SearchlightJobConfig
from raypipe.fmri.searchlight.runs import LightRuns, sphere_voxels_of
from raypipe.fmri.series import Subject, joined
from raypipe.read.confounds import Confounds
from raypipe.read.runfiles import RunFiles


def _config(table: Path, cache: Path) -> SearchlightJobConfig:
    return SearchlightJobConfig(
        table=table, run_dir=cache.parent / "run", cache_dir=cache, delay_s=0.0
    )


def _unpacked(table: Path) -> Path:
    """The same scans as plain .nii."""
    for path in table.parent.glob("*_bold.nii.gz"):
        nibabel.save(nibabel.load(path), path.with_name(path.name.removesuffix(".gz")))
    plain = table.with_name("plain.csv")
    plain.write_text(table.read_text().replace("_bold.nii.gz", "_bold.nii"))
    return plain


def _scrubbed(run: RunFiles, config: object) -> Confounds:
    """Two confounds, and another three volumes gone in each run."""
    number = int(run.run or 0)
    values = np.random.default_rng(number).normal(size=(N_VOLUMES, 2))
    kept = np.delete(np.arange(N_VOLUMES), [number, 10 + number, 30])
    return Confounds(names=("a", "b"), values=values, kept=kept)


@pytest.mark.parametrize("scrub", [False, True])
@pytest.mark.parametrize("kind", ["cache", "plain"])
def test_series_are_those_of_regions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, scrub: bool
) -> None:
    table = make_data(tmp_path / "data", ("01",))
    cfg = _config(_unpacked(table) if kind == "plain" else table, tmp_path / "cache")
    if scrub:
        monkeypatch.setattr(series_module, "read_confounds", _scrubbed)
        monkeypatch.setattr(runs_module, "read_confounds", _scrubbed)
    subject = Subject.open(cfg, runs_of(cfg, "01"), wanted_rois(cfg))
    whole = joined(cfg, subject, ["brain"], scratch=None, say=lambda text: None)["brain"]
    voxels = sphere_voxels_of(subject.regions, "brain")
    light = LightRuns(cfg, subject, voxels, reads=1, say=lambda text: None)
    assert light.n_volumes == N_RUNS * (N_VOLUMES - 3 * scrub)
    np.testing.assert_array_equal(light.volumes, whole.volumes)
    some = voxels[5::7]
    np.testing.assert_allclose(light.read(some), whole.values[5::7], atol=1e-6)
    assert len(light.ways) == N_RUNS
    light.close()


def test_a_voxel_that_is_not_finite_or_constant_is_remembered(tmp_path: Path) -> None:
    table = make_data(tmp_path / "data", ("01",))
    path = table.parent / "sub-01_run-2_bold.nii.gz"
    image = nibabel.load(path)
    values = np.ascontiguousarray(image.get_fdata(), np.float32)
    flat = values.reshape(-1, N_VOLUMES)
    flat[3, 5], flat[7] = np.nan, 4.0
    made = nibabel.Nifti1Image(values, image.affine)
    made.header.set_zooms(image.header.get_zooms())
    made.header.set_xyzt_units("mm", "sec")
    nibabel.save(made, path)
    cfg = _config(table, tmp_path / "cache")
    subject = Subject.open(cfg, runs_of(cfg, "01"), wanted_rois(cfg))
    light = LightRuns(cfg, subject, np.arange(120), reads=3, say=lambda text: None)
    light.read(np.arange(6))
    assert np.flatnonzero(light.not_finite).tolist() == [3]
    assert not light.constant.any()
    light.read(np.arange(4, 10))
    assert np.flatnonzero(light.constant).tolist() == [7]
    light.close()


def test_spheres_hold_the_brain_that_runs_share_or_the_region() -> None:
    region = {"V1": np.array([4, 5])}
    first, second = (
        Regions(voxels=region, outside={}, bad={}, brain=np.arange(a, b))
        for a, b in ((0, 9), (3, 12))
    )
    np.testing.assert_array_equal(sphere_voxels_of([first, second], "V1"), np.arange(3, 9))
    bare = Regions(voxels=region, outside={}, bad={}, brain=None)
    np.testing.assert_array_equal(sphere_voxels_of([first, bare], "V1"), [4, 5])
