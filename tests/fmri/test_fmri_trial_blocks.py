"""What is exchanged in permutations: blocks as they were shown, and betas trial by trial."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_kit import mvpa_config as make_config
from run_kit import record, run

from raypipe.errors import ConfigError, InputError
from raypipe.fmri.config import MvpaJobConfig
from raypipe.fmri.mvpa import Design, MvpaConfig
from raypipe.fmri.mvpa.permute import permutations
from raypipe.fmri.samples import design_of
from raypipe.fmri.units import Target
from raypipe.read.runfiles import RunFiles

TRIALS = ("face", "face", "face", "house", "face", "house", "house", "house")


def _runs(folder: Path, onset: bool = True) -> list[RunFiles]:
    """Two runs of ``TRIALS``, the second the other way round, as `fmri betas` writes them or not."""
    runs = []
    for number, kinds in (("1", TRIALS), ("2", TRIALS[::-1])):
        header = "trial_type\tonset\tduration" if onset else "trial_type\tnote"
        rows = [f"{k}\t{4 * i}\t2" if onset else f"{k}\tx" for i, k in enumerate(kinds)]
        (folder / f"run-{number}_trials.tsv").write_text("\n".join([header, *rows]) + "\n")
        runs.append(RunFiles(subject="01", run=number, bold=folder / f"{number}.nii.gz"))
    return runs


def _config(folder: Path, each: str = "volume") -> MvpaJobConfig:
    return MvpaJobConfig(
        table=folder / "t.csv", run_dir=folder / "run", delay_s=0.0, each=each,
        labels=f"{folder}/run-{{run}}_trials.tsv",
    )  # fmt: skip


def _design(folder: Path, each: str = "volume", onset: bool = True) -> Design:
    runs = _runs(folder, onset)
    return design_of(_config(folder, each), Target(name="all"), runs, [len(TRIALS)] * 2, None)


def test_betas_are_permuted_one_by_one(tmp_path: Path) -> None:
    """Trials of one label in a row are no block: as blocks, runs would get other numbers of a class."""
    design = _design(tmp_path)
    assert len(np.unique(design.blocks)) == len(design) == 16
    drawn = permutations(design, 50, exchange="block", seed=0)
    np.testing.assert_array_equal(drawn, permutations(design, 50, exchange="sample", seed=0))
    for labels in design.labels[drawn]:
        for one in (0, 1):
            assert sorted(labels[design.runs == one]) == sorted(TRIALS)
    assert len(_design(tmp_path, each="trial")) == 16, "a trial is a row, not a stretch of rows"


def test_volumes_of_one_label_in_a_row_are_a_block(tmp_path: Path) -> None:
    design = _design(tmp_path, onset=False)
    assert len(np.unique(design.blocks)) == 2 * 4
    assert len(_design(tmp_path, each="trial", onset=False)) == 2 * 4


@given(st.integers(0, 500), st.sampled_from(["block", "sample"]))
@settings(max_examples=40, deadline=None)
def test_labels_stay_in_their_run_and_blocks_stay_whole(seed: int, exchange: str) -> None:
    """Equal blocks, as designs mostly have: each run keeps its number of each class."""
    rng = np.random.default_rng(seed)
    kinds = np.concatenate([rng.permutation(["a", "b"] * 3) for _ in range(3)])
    labels, blocks = np.repeat(kinds, 4), np.repeat(np.arange(18), 4)
    runs, n = np.repeat(np.arange(3), 24), 72
    design = Design(
        labels=labels, runs=runs, blocks=blocks, start=np.arange(n + 1), volumes=np.arange(n)
    )
    for drawn in permutations(design, 5, exchange=exchange, seed=seed):
        assert (runs[drawn] == runs).all()
        for one in range(3):
            assert (labels[drawn][runs == one] == "a").sum() == 12
        if exchange == "block":
            assert all(len(set(labels[drawn][blocks == block])) == 1 for block in range(18))


@pytest.mark.usefixtures("no_page")
def test_a_changed_way_of_permuting_is_computed_again(table: Path, tmp_path: Path) -> None:
    folder = table.parent
    for number in (1, 2, 3):
        rows = (folder / f"sub-01_run-{number}_events.tsv").read_text().split("\n")[1:-1]
        kinds = [row.split("\t")[2] for row in rows for _ in range(5)]
        (folder / f"labels-{number}.txt").write_text("label\n" + "\n".join(kinds) + "\n")
    few = MvpaConfig(scores=("accuracy",), n_permutations=5)
    cfg = make_config(table, tmp_path / "run", mvpa=few, labels=f"{folder}/labels-{{run}}.txt")
    run(cfg)
    before = record(cfg, "sub-01_roi-yes_target-all")
    for path in folder.glob("labels-*.txt"):
        lines = path.read_text().split("\n")[1:-1]
        text = "\n".join(f"{kind}\t{3 * i}" for i, kind in enumerate(lines))
        path.write_text(f"label\tonset\n{text}\n")
    run(cfg)
    after = record(cfg, "sub-01_roi-yes_target-all")
    assert after["key"] != before["key"]
    assert after["folds"] == before["folds"]
    assert after["null"] != before["null"]


def test_rows_a_tr_apart_are_volumes(tmp_path: Path) -> None:
    """A table of a label a volume may tell the time of each."""
    folder, runs = tmp_path, []
    for number in ("1", "2"):
        rows = "".join(f"{kind}\t{2.0 * i}\n" for i, kind in enumerate(TRIALS))
        (folder / f"{number}.tsv").write_text(f"label\tonset\n{rows}")
        runs.append(RunFiles(subject="01", run=number, bold=folder / f"{number}.nii.gz"))
    cfg = MvpaJobConfig(
        table=folder / "t.csv", run_dir=folder / "run", delay_s=0.0, labels=f"{folder}/{{run}}.tsv"
    )
    blocks = {}
    for t_r_s in (2.0, 3.0):
        design = design_of(cfg, Target(name="all"), runs, [len(TRIALS)] * 2, t_r_s)
        blocks[t_r_s] = len(np.unique(design.blocks))
    assert blocks == {2.0: 2 * 4, 3.0: 16}


def test_trials_have_no_delay_and_all_runs_are_alike(tmp_path: Path) -> None:
    runs = _runs(tmp_path)
    cfg = replace(_config(tmp_path), delay_s=4.0)
    with pytest.raises(ConfigError, match=r"delay_s 4\.0 is of volumes.*have a trial a row"):
        design_of(cfg, Target(name="all"), runs, [len(TRIALS)] * 2, 2.0)
    (tmp_path / "run-2_trials.tsv").write_text("\n".join(["trial_type", *TRIALS]) + "\n")
    with pytest.raises(
        InputError, match=r"a trial a row .column onset., those of .* a volume a row"
    ):
        design_of(_config(tmp_path), Target(name="all"), runs, [len(TRIALS)] * 2, None)
