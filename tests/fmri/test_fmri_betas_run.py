"""`raypipe fmri betas` from files to images, without Ray: nilearn's numbers, decoding from them, resume."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
from nilearn.glm.first_level import FirstLevelModel
from run_kit import AFFINE, N_RUNS, SHAPE, T_R_S, make_data, mvpa_config, record, written

from raypipe.cli import main
from raypipe.errors import ConfigError, InputError, MemoryBudgetExceeded
from raypipe.fmri.clean import CleanConfig
from raypipe.fmri.commands import FmriSummary, mvpa
from raypipe.fmri.glm import worker as worker_module
from raypipe.fmri.glm.contrasts import GlmResult
from raypipe.fmri.glm.items import BetaItem
from raypipe.fmri.glm.job import BetasConfig
from raypipe.fmri.glm.outputs import save_contrasts, write_volumes
from raypipe.fmri.glm.run import betas
from raypipe.fmri.masks import Grid
from raypipe.fmri.report import write_report
from raypipe.fmri.units import Unit
from raypipe.read.runfiles import RunFiles
from raypipe.runner import LocalRunner

pytestmark = pytest.mark.usefixtures("no_page")


@pytest.fixture(scope="module")
def shared_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return make_data(tmp_path_factory.mktemp("betas") / "data")


def config(table: Path, run_dir: Path, **more: Any) -> BetasConfig:
    values: dict[str, Any] = {"table": table, "run_dir": run_dir}
    return BetasConfig(**values | {"cache_dir": run_dir.parent / "cache"} | more)


def run(cfg: BetasConfig) -> FmriSummary:
    return betas(cfg, LocalRunner())


def image(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj, np.float64)


def nilearns(table: Path, runs: list[int], asked: list[str], kind: str, trials: bool) -> np.ndarray:
    """(x, y, z, len(asked)) of nilearn's model of subject 01."""
    columns = ["onset", "duration", "trial_type"]
    paths = [table.parent / f"sub-01_run-{n}_events.tsv" for n in runs]
    events = [pd.read_csv(path, sep="\t")[columns] for path in paths]
    for one in events:
        if trials:
            one["trial_type"] = [f"t{i}" for i in range(len(one))]
    every = nibabel.Nifti1Image(np.ones(SHAPE, np.uint8), AFFINE)
    scans = [nibabel.load(table.parent / f"sub-01_run-{n}_bold.nii.gz") for n in runs]
    scans = [nibabel.Nifti1Image(s.get_fdata(), AFFINE) for s in scans]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FirstLevelModel(t_r=T_R_S, mask_img=every).fit(scans, events=events)
        maps = [model.compute_contrast(one, output_type=kind) for one in asked]
    return np.stack([np.asarray(one.dataobj) for one in maps], axis=3)


def test_betas_are_nilearns_and_their_table_tells_the_trials(
    shared_table: Path, tmp_path: Path
) -> None:
    cfg = config(shared_table, tmp_path / "run", method="lsa")
    summary = run(cfg)
    assert (summary.units, summary.computed, summary.found) == (2 * N_RUNS, 2 * N_RUNS, 0)
    path = cfg.run_dir / "betas" / "sub-01_run-2_roi-brain_betas.nii.gz"
    reference = nilearns(shared_table, [2], [f"t{i}" for i in range(8)], "effect_size", True)
    np.testing.assert_allclose(image(path), reference, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(nibabel.load(path).affine, AFFINE)
    table = pd.read_csv(str(path).replace("betas.nii.gz", "trials.tsv"), sep="\t")
    events = pd.read_csv(shared_table.parent / "sub-01_run-2_events.tsv", sep="\t")
    for name in ("trial_type", "onset", "duration"):
        assert table[name].tolist() == events[name].tolist()
    told = record(cfg, "sub-01_roi-brain_target-run-2")
    assert (told["n_trials"], told["trials"], told["n_voxels"]) == (8, {"cat": 4, "dog": 4}, 120)


def test_betas_are_decoded_by_the_table_that_is_left(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans_of = table.parent
    for path in scans_of.glob("*_events.tsv"):  # the scans respond at once, a model after 5 s
        events = pd.read_csv(path, sep="\t")
        events["onset"] -= 5.0
        events.to_csv(path, sep="\t", index=False)
    cfg = config(table, tmp_path / "run")
    run(cfg)
    said = capsys.readouterr()
    table = cfg.run_dir / "betas_roi-brain.csv"
    assert str(table) in said.out
    labels = said.err.split("--labels '")[1].split("'")[0]
    rois = tuple(f"{name}={scans_of}/rois/{name}.nii.gz" for name in ("yes", "no"))
    decoding = mvpa_config(
        table,
        tmp_path / "decoded",
        labels=labels,
        roi=rois,
        clean=CleanConfig(standardize="zscore_sample"),
    )
    found = {row["roi"]: row["mean"] for row in mvpa(decoding, LocalRunner()).group}
    assert found["yes"] > 0.85
    assert abs(found["no"] - 0.5) < 0.2
    told = record(decoding, "sub-01_roi-yes_target-all")
    assert (told["n_samples"], len(told["folds"]["accuracy"])) == (8 * N_RUNS, N_RUNS)


def test_conditions_are_nilearns_fixed_effects_over_runs(
    shared_table: Path, tmp_path: Path
) -> None:
    cfg = config(shared_table, tmp_path / "run", method="conditions", contrast=("d=dog - cat",))
    assert run(cfg).computed == 2
    for kind, theirs in (("effect", "effect_size"), ("t", "stat"), ("z", "z_score")):
        ours = image(cfg.run_dir / f"maps/sub-01_roi-brain_target-conditions_d_{kind}.nii.gz")
        reference = nilearns(shared_table, [1, 2, 3], ["dog - cat"], theirs, False)[..., 0]
        np.testing.assert_allclose(ours, reference, rtol=1e-3, atol=1e-4)
    for path in cfg.run_dir.glob("maps/sub-02*"):
        path.unlink()
    page = write_report(cfg.run_dir).read_text()
    assert page.count('alt="Brain map: sub-01 brain: d, z') == 1
    assert "fMRI models" in page
    each = replace(cfg, contrast=())
    assert run(each).computed == 2
    names = {path.name.split("_")[3] for path in cfg.run_dir.glob("maps/sub-01*_z.nii.gz")}
    assert {"cat", "dog"} <= names


def test_finished_units_stay_and_changed_ones_are_fitted_again(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(table, tmp_path / "run", method="lsa", noise="ols")
    run(cfg)
    before = written(cfg)
    again = run(cfg)
    assert (again.computed, again.found) == (0, 6)
    assert written(cfg) == before
    assert run(replace(cfg, block_memory="64MiB")).computed == 0
    assert run(replace(cfg, hrf="spm")).computed == 6
    cfg = replace(cfg, hrf="spm")
    events = table.parent / "sub-02_run-1_events.tsv"
    events.write_text(events.read_text().replace("cat", "cow"))
    changed = run(cfg)
    assert (changed.computed, changed.found) == (1, 5), "the run whose events changed"
    events.unlink()
    capsys.readouterr()
    with pytest.raises(InputError, match="1 of 4 units failed"):
        run(cfg)
    assert "sub-02" in capsys.readouterr().err


def test_less_memory_means_smaller_blocks_and_the_same_betas(
    shared_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(shared_table, tmp_path / "run", method="lsa", noise="ols")
    run(cfg)
    budgets: list[int] = []
    real = worker_module.trials_of

    def trials_of(cfg: Any, item: BetaItem, *rest: Any) -> Any:
        budgets.append(item.budget_bytes)
        if item.budget_bytes > limit:
            raise MemoryError
        return real(cfg, item, *rest)

    limit = 100 << 20
    monkeypatch.setattr(worker_module, "trials_of", trials_of)
    monkeypatch.setattr(worker_module, "relieve", lambda: None)  # gc.collect
    small = replace(cfg, run_dir=tmp_path / "small")
    run(small)
    assert budgets[:3] == [256 << 20, 128 << 20, 64 << 20]
    name = "betas/sub-01_run-1_roi-brain_betas.nii.gz"
    np.testing.assert_allclose(image(small.run_dir / name), image(cfg.run_dir / name), rtol=1e-6)
    limit = 0
    with pytest.raises(MemoryBudgetExceeded, match="sub-01_roi-brain_target-run-1"):
        run(replace(cfg, run_dir=tmp_path / "none"))
    item = BetaItem(
        unit=Unit(subject="01", roi="brain", target="run-1"),
        runs=(),
        first=0,
        budget_bytes=8 << 20,
    )
    assert item.at_most(item.with_less_memory()).budget_bytes == 4 << 20
    assert item.with_less_memory().at_most(item).budget_bytes == 4 << 20


def test_volumes_are_written_one_by_one_as_nibabel_reads_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = (-10, 5, 7)
    grid = Grid(shape=(3, 4, 2), affine=affine)
    voxels = np.array([1, 5, 23])
    values = rng.normal(size=(3, 6)).astype(np.float32)
    written_to = nibabel.load(write_volumes(tmp_path / "b.nii.gz", values, voxels, grid))
    assert written_to.shape == (3, 4, 2, 6)
    np.testing.assert_array_equal(written_to.affine, affine)
    flat = np.asarray(written_to.dataobj).reshape(24, 6)
    np.testing.assert_array_equal(flat[voxels], values)
    assert np.isnan(np.delete(flat, voxels, axis=0)).all()
    written_to.get_fdata()


def test_the_command_line_plans_and_runs(
    shared_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["fmri", "betas", "--table", str(shared_table), "--run-dir", str(tmp_path / "run")]
    flags += ["--cache-dir", str(tmp_path / "cache"), "--runner", "local", "--noise", "ols"]
    assert main([*flags, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "units: 6, each a run and region by lss; 0 done before, 6 to compute" in told
    assert "predicted peak of a worker" in told
    assert not (tmp_path / "run").exists()
    assert main(flags) == 0
    assert main(["fmri", "betas", "--config", str(tmp_path / "run" / "config.yaml")]) == 0
    assert "6 were done before" in capsys.readouterr().err
    assert main([*flags, "--detrend"]) == 2
    assert "a model removes drift" in capsys.readouterr().err


def test_what_a_model_cannot_do_is_said_when_it_is_asked(tmp_path: Path) -> None:
    for more, words in (
        ({"cache": False}, "needs the cache"),
        ({"contrast": ("a - b",)}, "is of conditions, the method is lss"),
        ({"contrast": ("",), "method": "conditions"}, "contrast '' is not NAME="),
        ({"contrast": ("a=",), "method": "conditions"}, "contrast 'a=' is not NAME="),
        ({"method": "conditions", "keep": ("a",)}, "is of trials"),
        ({"hrf": "fir"}, "no single value"),
        ({"method": "conditions", "contrast": ("a=x", "a=y")}, "given twice"),
        ({"method": "conditions", "contrast": ("a - b", "a + b")}, "two would have the same files"),
    ):
        with pytest.raises(ConfigError, match=words):
            config(tmp_path / "runs.csv", tmp_path / "run", **more)


def test_trial_types_whose_maps_would_overwrite_each_other_are_refused(tmp_path: Path) -> None:
    cfg = config(tmp_path / "runs.csv", tmp_path / "run", method="conditions")
    one = Unit(subject="01", roi="brain", target="conditions")
    nothing = np.zeros(0, bool)
    made = GlmResult(
        voxels=np.zeros(0, np.int64),
        maps={"face_1": None, "face 1": None},  # type: ignore[dict-item]
        constant=nothing,
        not_finite=nothing,
        n_runs=1,
    )
    grid = Grid(shape=(2, 2, 2), affine=np.eye(4))
    with pytest.raises(InputError, match=r"face_1, face 1 would have the same files; name one by"):
        save_contrasts(cfg, one, RunFiles(subject="01", bold=tmp_path / "b.nii"), grid, made)
