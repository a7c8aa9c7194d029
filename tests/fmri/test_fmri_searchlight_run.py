"""`raypipe fmri searchlight` from files to maps, without Ray: what is found where, resume, memory."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from nilearn.decoding import SearchLight
from nilearn.maskers import NiftiMasker
from run_kit import AFFINE, N_RUNS, N_VOLUMES, SHAPE, make_data
from sklearn.model_selection import LeaveOneGroupOut
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from raypipe.cli import main
from raypipe.errors import ConfigError, InputError, MemoryBudgetExceeded
from raypipe.fmri.commands import FmriSummary
from raypipe.fmri.mvpa import MvpaConfig
from raypipe.fmri.report import write_report
from raypipe.fmri.searchlight import opened as opened_module
from raypipe.fmri.searchlight import worker as worker_module
from raypipe.fmri.searchlight.blockfile import key_of, load_block
from raypipe.fmri.searchlight.items import LightItem, merged
from raypipe.fmri.searchlight.job import SearchlightJobConfig
from raypipe.fmri.searchlight.run import run_searchlight
from raypipe.fmri.units import Unit
from raypipe.memory.guard import NoGuard, guarding
from raypipe.runner import LocalRunner

pytestmark = pytest.mark.usefixtures("no_page")

N_VOXELS = int(np.prod(SHAPE))
MAP = "maps/sub-{}_roi-brain_target-all_accuracy_searchlight.nii.gz"


@pytest.fixture(scope="module")
def shared_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return make_data(tmp_path_factory.mktemp("light") / "data")


def config(table: Path, run_dir: Path, **more: Any) -> SearchlightJobConfig:
    """A sample a trial, 3.5 mm: a voxel and its six neighbours."""
    values: dict[str, Any] = {
        "table": table,
        "run_dir": run_dir,
        "cache_dir": run_dir.parent / "cache",
        "delay_s": 0.0,
        "each": "trial",
        "radius_mm": 3.5,
        "centres_a_block": 40,
    }
    return SearchlightJobConfig(**values | more)


def run(cfg: SearchlightJobConfig) -> FmriSummary:
    return run_searchlight(cfg, LocalRunner())


def volume(cfg: SearchlightJobConfig, subject: str = "01", name: str = MAP) -> np.ndarray:
    return np.asarray(nibabel.load(cfg.run_dir / name.format(subject)).dataobj, np.float64)


def test_the_map_is_nilearns_searchlight_on_nilearns_cleaned_series(
    shared_table: Path, tmp_path: Path
) -> None:
    yes = shared_table.parent / "rois" / "yes.nii.gz"  # centres; spheres reach into the brain
    cfg = config(shared_table, tmp_path / "run", each="volume", radius_mm=4.5, roi=(f"yes={yes}",))
    run(cfg)
    folder, parts, labels = shared_table.parent, [], []
    every = nibabel.Nifti1Image(np.ones(SHAPE, np.uint8), AFFINE)
    for number in range(1, N_RUNS + 1):
        masker = NiftiMasker(every, detrend=True, standardize="zscore_sample")
        cleaned = masker.fit_transform(folder / f"sub-01_run-{number}_bold.nii.gz")
        parts.append(masker.inverse_transform(cleaned))
        rows = (folder / f"sub-01_run-{number}_events.tsv").read_text().split("\n")[1:-1]
        labels += [row.split("\t")[2] for row in rows for _ in range(5)]
    light = SearchLight(
        every,
        nibabel.load(yes),
        radius=4.5,
        estimator=make_pipeline(StandardScaler(), SVC(kernel="linear")),
        scoring="accuracy",
        cv=LeaveOneGroupOut(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        joined = nibabel.concat_images(parts, axis=3)
        light.fit(joined, labels, np.repeat(np.arange(N_RUNS), N_VOLUMES))
    ours = volume(cfg, name=MAP.replace("roi-brain", "roi-yes"))
    assert np.isnan(ours[1:]).all()
    # float32 series: a sample at the border may change sides
    assert np.abs(ours[0] - light.scores_[0]).max() <= 1 / 40
    assert np.mean(ours[0] == light.scores_[0].astype(np.float32)) > 0.9


def test_the_planted_plane_is_found_and_the_rest_is_not(
    shared_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decode = MvpaConfig(scores=("accuracy",), n_permutations=39)
    cfg = config(shared_table, tmp_path / "run", mvpa=decode)
    summary = run(cfg)
    assert (summary.units, summary.computed, summary.found) == (2, 2, 0)
    assert summary.blocks == 2 * 4  # of 120 voxels, halved until 40 or fewer
    for subject in ("01", "02"):
        scores = volume(cfg, subject)
        assert scores[0].min() > 0.75  # the plane x = 0 follows the labels
        assert abs(scores[2:].mean() - 0.5) < 0.15  # spheres that do not touch it
        told = json.loads(
            (cfg.run_dir / "units" / f"sub-{subject}_roi-brain_target-all.json").read_text()
        )
        assert told["peaks_mm"]["accuracy"][0] <= 3.0
        assert told["p"]["accuracy"] == 1 / 40  # no permutation has as high a peak
        assert told["n_centres"] == N_VOXELS
        assert told["sphere_voxels"] == [4, 6, 7]
        corrected = 10 ** -volume(cfg, subject, MAP.replace("searchlight", "logp"))
        assert corrected.min() == pytest.approx(told["p"]["accuracy"], rel=1e-5)
        assert (corrected[0] < 1.5 / 40).mean() >= 0.5
        assert (corrected[2:] > 1.5 / 40).all(), "nothing is found in the empty part"
    assert {path.name.split("_")[-1] for path in cfg.run_dir.glob("maps/group*.nii.gz")} == {
        *("searchlight.nii.gz", "t.nii.gz", "logp.nii.gz", "logq.nii.gz")
    }
    row = summary.group[0]
    both = (volume(cfg, "01") + volume(cfg, "02")) / 2
    group = volume(cfg, name="maps/group_roi-brain_target-all_accuracy_searchlight.nii.gz")
    np.testing.assert_allclose(group, both, atol=1e-6)
    assert row["mean"] == pytest.approx(both.max())
    assert row["n_centres"] == N_VOXELS
    assert "brain all accuracy: mean" in capsys.readouterr().out
    for pattern in ("sub-02*", "*_log[pq]*", "group*_t.*"):  # each map drawn takes a second
        for path in cfg.run_dir.glob(f"maps/{pattern}"):
            path.unlink()
    page = write_report(cfg.run_dir).read_text()
    assert "Searchlight: all" in page
    assert page.count('alt="Brain map: brain: all, mean accuracy over 2 subjects') == 1
    assert page.count('alt="Brain map: sub-01 brain: all, accuracy around each voxel') == 1


def test_a_finished_block_is_never_computed_again(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(table, tmp_path / "run")
    scored: list[int] = []
    real = opened_module.OpenMap.score

    def score(self: Any, centres: Any) -> Any:
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.append(len(centres))
        return real(self, centres)

    with monkeypatch.context() as patch:
        patch.setattr(opened_module.OpenMap, "score", score)
        with pytest.raises(KeyboardInterrupt):
            run(cfg)
    kept = {path: path.stat().st_mtime_ns for path in cfg.run_dir.glob("blocks/*/*.npz")}
    assert len(kept) == 3
    assert not (cfg.run_dir / "units").exists()
    resumed = run(cfg)
    assert (resumed.computed, resumed.found, resumed.blocks) == (2, 0, 8 - 3)
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    again = run(cfg)
    assert (again.computed, again.found, again.blocks) == (0, 2, 0)
    whole = config(table, tmp_path / "whole")
    run(whole)
    np.testing.assert_array_equal(volume(cfg), volume(whole))
    (cfg.run_dir / MAP.format("01")).unlink()
    remade = run(cfg)
    assert (remade.computed, remade.found, remade.blocks) == (1, 1, 0), "put together again"
    np.testing.assert_array_equal(volume(cfg), volume(whole))


def test_a_changed_option_or_input_is_computed_again(table: Path, tmp_path: Path) -> None:
    cfg = config(table, tmp_path / "run")
    run(cfg)
    assert run(replace(cfg, centres_a_block=30)).blocks == 0, "another cut of a finished map"
    assert run(replace(cfg, radius_mm=5.0)).blocks == 8
    assert run(replace(cfg, mvpa=replace(cfg.mvpa, scale="centre"))).blocks == 8
    cfg = replace(cfg, mvpa=replace(cfg.mvpa, scale="centre"))
    events = table.parent / "sub-02_run-1_events.tsv"
    text = events.read_text().replace("cat", "DOG").replace("dog", "cat").replace("DOG", "dog")
    events.write_text(text)
    changed = run(cfg)
    assert (changed.computed, changed.found, changed.blocks) == (1, 1, 4)


def test_one_bad_subject_fails_its_maps_and_no_others(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = table.parent / "sub-02_run-2_bold.nii.gz"
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    cfg = config(table, tmp_path / "run")
    with pytest.raises(InputError, match="1 of 2 units failed"):
        run(cfg)
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("failed: ")]
    assert len(said) == 1, "once, not once a block"
    assert "sub-02_run-2_bold" in said[0]
    assert volume(cfg).shape == SHAPE
    cut.write_bytes(whole)
    mended = run(cfg)
    assert (mended.computed, mended.found, mended.blocks) == (1, 1, 4)


def test_numbers_are_mapped_and_folds_that_mix_runs_are_told_once_a_map(
    shared_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decode = MvpaConfig(cv="shuffled", n_folds=3)
    cfg = config(shared_table, tmp_path / "run", target=("number:rating",), mvpa=decode)
    run(cfg)
    assert capsys.readouterr().err.count("folds mix runs") == 2
    scores = volume(cfg, name=MAP.replace("target-all_accuracy", "target-rating_r"))
    assert scores[0].mean() > 0.6 > 0.3 > scores[2:].mean()
    told = json.loads((cfg.run_dir / "units" / "sub-01_roi-brain_target-rating.json").read_text())
    assert told["chance"] == {"r": 0.0}
    assert "folds mix runs" in told["warnings"][0]


class Pressed(NoGuard):
    """Memory is short at every boundary."""

    def pressure(self) -> bool:
        return True


def test_less_memory_gives_the_same_map(
    shared_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(shared_table, tmp_path / "run", mvpa=MvpaConfig(n_permutations=5))
    run(cfg)
    sizes: list[int] = []
    real = opened_module.OpenMap.score

    def score(self: Any, centres: Any) -> Any:
        sizes.append(len(centres))
        if len(centres) > limit:
            raise MemoryError
        return real(self, centres)

    limit = 5
    monkeypatch.setattr(opened_module.OpenMap, "score", score)
    monkeypatch.setattr(worker_module, "current", Pressed)
    monkeypatch.setattr(worker_module, "relieve", lambda: None)  # gc.collect, 200 times
    small = replace(cfg, run_dir=tmp_path / "small")
    with guarding(Pressed()):
        run(small)
    assert max(sizes) <= 15, "halved before the first try"
    for name in (MAP, MAP.replace("searchlight", "logp")):
        np.testing.assert_allclose(volume(small, name=name), volume(cfg, name=name), atol=1e-6)
    limit = 0
    with pytest.raises(MemoryBudgetExceeded, match="one sphere of sub-01_roi-brain_target-all"):
        run(replace(cfg, run_dir=tmp_path / "none"))


def test_an_item_takes_less_down_to_one_centre() -> None:
    item = LightItem(
        unit=Unit(subject="01", roi="brain", target="all"),
        number=3,
        block_key="k",
        runs=(),
        centres=np.arange(5),
        at_once=5,
    )
    seen = [item]
    while seen[-1].at_once > 1:
        seen.append(seen[-1].with_less_memory())
    assert [one.at_once for one in seen] == [5, 3, 2, 1]
    assert {one.key for one in seen} == {("sub-01_roi-brain_target-all", 3)}
    with pytest.raises(MemoryBudgetExceeded, match="one sphere of sub-01_roi-brain"):
        seen[-1].with_less_memory()
    assert item.at_most(seen[1]).at_once == 3
    assert seen[2].at_most(item).at_once == 2
    assert item.again() is item


def test_damaged_blocks_count_as_absent(table: Path, tmp_path: Path) -> None:
    cfg = config(table, tmp_path / "run")
    run(cfg)
    path = cfg.run_dir / "blocks" / "sub-01_roi-brain_target-all" / "00001.npz"
    block = load_block(path)
    assert merged(1, [block.scores]).centres.tolist() == block.scores.centres.tolist()
    path.write_bytes(path.read_bytes()[:100])
    assert key_of(path) is None
    assert key_of(path.with_name("00099.npz")) is None
    path.write_bytes(b"")
    assert key_of(path) is None
    (cfg.run_dir / MAP.format("01")).unlink()
    assert run(cfg).blocks == 1


def flags(table: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *("fmri", "searchlight", "--table", str(table), "--run-dir", str(run_dir)),
        *("--delay-s", "0", "--each", "trial", "--radius-mm", "3.5", "--runner", "local"),
        *("--cache-dir", str(run_dir.parent / "cache"), *more),
    ]


def test_the_command_line_plans_and_runs(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert main([*flags(table, run_dir), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "120 spheres of 3.5 mm in 120 voxels, 1 blocks, 0 done before" in told
    assert "maps: 2, 0 done before, 2 to make of 2 blocks" in told
    assert "predicted peak of a worker" in told
    assert "time: not measured yet" in told
    assert not run_dir.exists()
    assert main(flags(table, run_dir)) == 0
    assert main(["fmri", "searchlight", "--config", str(run_dir / "config.yaml")]) == 0
    assert "0 units in 0.0 s, 2 were done before" in capsys.readouterr().err
    small = flags(table, tmp_path / "b", "--max-memory-per-process", "600MiB")
    assert main(small) == 3
    assert not (tmp_path / "b").exists()
    tiny = flags(table, tmp_path / "c", "--block-memory", "10KiB")
    assert main(tiny) == 3
    assert "one sphere of 3.5 mm takes" in capsys.readouterr().err


def test_what_a_searchlight_cannot_do_is_said_when_it_is_asked(tmp_path: Path) -> None:
    for more, words in (
        ({"sphere": ("FFA=1,2,3",)}, "give --roi"),
        ({"cache": False}, "needs the cache"),
        ({"radius_mm": 0.0}, "radius_mm 0.0 is not above 0"),
        ({"centres_a_block": 0}, "centres_a_block 0 is below 1"),
        ({"block_memory": "0"}, "block_memory '0' is 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            config(tmp_path / "runs.csv", tmp_path / "run", **more)
