"""fMRI runs on Ray: kill -9, Ctrl-C and outgrown budgets lose the unit under way and no other."""

from __future__ import annotations

import gzip
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from real_kills import killing
from run_kit import AFFINE, flags, make_data, mvpa_config

from raypipe.cli import main
from raypipe.cluster.runner import RayRunner
from raypipe.cluster.session import own_machine
from raypipe.fmri.commands import mvpa, roi
from raypipe.fmri.config import RoiConfig
from raypipe.fmri.mvpa import EstimatorConfig, MvpaConfig
from raypipe.memory.config import MemoryFlags, resolve
from raypipe.memory.verdict import read_all
from raypipe.runner import LocalRunner, Needs

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_session", "no_page")]


def records(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Unit -> its record; those being replaced are left out."""
    found = {}
    for path in (run_dir / "units").glob("*.json"):
        try:
            found[path.stem] = json.loads(path.read_text()) | {"at": path.stat().st_mtime_ns}
        except FileNotFoundError:
            continue
    return found


def test_a_killed_worker_loses_the_unit_under_way_and_no_other(tmp_path: Path) -> None:
    table = make_data(tmp_path / "data", ("01", "02", "03"))
    # A refitted model and many permutations: half a second a unit, to be killed in.
    slow = MvpaConfig(
        model=EstimatorConfig(estimator="logistic"), n_permutations=60, scores=("accuracy",)
    )
    cfg = mvpa_config(table, tmp_path / "ray", mvpa=slow, workers=2)
    events: list[str] = []
    with killing(lambda: records(cfg.run_dir)) as killed:
        summary = mvpa(cfg, RayRunner(joined=False, on_event=events.append))
    assert killed.before, "nothing was finished before the kill"
    assert any(f"worker {killed.pid} failed" in event for event in events)
    assert (summary.units, summary.computed, summary.failed) == (6, 6, {})
    after = records(cfg.run_dir)
    assert len(after) == 6
    for name, record in killed.before.items():
        assert after[name]["at"] == record["at"], f"{name} was finished, and computed again"
    assert not list(cfg.run_dir.rglob("*.tmp"))

    here = mvpa_config(table, tmp_path / "local", mvpa=slow)
    mvpa(here, LocalRunner())
    for name, record in records(here.run_dir).items():
        for field in ("key", "folds", "null", "p", "predicted"):
            assert after[name][field] == record[field]

    again = mvpa(replace(cfg, workers=1), RayRunner(joined=False, on_event=events.append))
    assert (again.computed, again.found) == (0, 6)


@pytest.mark.usefixtures("heeded_sigint")
def test_ctrl_c_keeps_finished_units_and_the_same_command_does_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, run_dir = make_data(tmp_path / "data"), tmp_path / "run"
    slow = ["--estimator", "logistic", "--n-permutations", "60", "--workers", "1"]
    command = flags(table, run_dir, *slow, "--runner", "ray")
    with killing(lambda: records(run_dir), lambda _: os.getpid(), by=signal.SIGINT):
        assert main(command) == 130
    assert "the same command resumes" in capsys.readouterr().err
    before = records(run_dir)
    assert 0 < len(before) < 4, "the interrupt must fall inside the run, or nothing was shown"
    assert main(command) == 0
    after = records(run_dir)
    assert len(after) == 4
    assert {name: after[name]["at"] for name in before} == {n: r["at"] for n, r in before.items()}
    summary = json.loads((run_dir / "run.json").read_text())["summary"]
    assert (summary["computed"], summary["found"]) == (4 - len(before), len(before))


def test_a_unit_that_outgrows_its_budget_ends_the_run_by_its_name_and_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of 7 GiB of weights, which no prediction from the patterns can know."""
    table = make_data(tmp_path / "data", ("01",))
    hog = ["--estimator", "sklearn.neural_network.MLPClassifier"]
    hog += ["--params", "hidden_layer_sizes=[30000,30000]", "--workers", "1"]
    hog += ["--roi", f"yes={table.parent}/rois/yes.nii.gz"]
    command = flags(table, tmp_path / "run", *hog, "--max-memory-per-process", "1GiB")
    assert main([*command, "--runner", "ray"]) == 3
    last = capsys.readouterr().err.splitlines()[-1]
    for words in (
        "was stopped in sub-01_roi-yes_target-all at batch 1",
        "of its budget of 1.00 GiB",
        "one ROI of subject 01 (yes)",
        "take a smaller ROI, fewer --workers, or a larger --max-memory-per-process",
    ):
        assert words in last
    assert read_all(tmp_path / "run" / "memory"), "the node's memory actor wrote why"


N_REGIONS, REGION, LONG = 24, 5000, 2200


class Tight(RayRunner):
    """Plans with much memory and gives workers little, as if the predictions were too low."""

    def pool(self, worker: Any, needs: Needs) -> Any:
        self.memory = resolve(MemoryFlags(max_memory_per_process="800MiB"), environ={})
        return super().pool(worker, needs)


def test_a_worker_over_its_budget_is_ended_and_takes_fewer_regions_at_once(tmp_path: Path) -> None:
    """Raw series of all regions are 500 MiB: too much beside what a worker is, half of them is not."""
    shape = (REGION // 50, 50, N_REGIONS)
    atlas = np.broadcast_to(np.arange(1, N_REGIONS + 1, dtype=np.int16), shape)
    nibabel.save(nibabel.Nifti1Image(atlas, AFFINE), tmp_path / "atlas.nii")
    image = nibabel.Nifti1Image(np.zeros((*shape, 1), np.int16), AFFINE)
    image.header.set_data_shape((*shape, LONG))
    with gzip.open(tmp_path / "bold.nii.gz", "wb", compresslevel=1) as file:
        image.header.write_to(file)
        file.write(bytes(4))
        for _ in range(LONG):
            file.write(bytes(2 * REGION * N_REGIONS))
    (tmp_path / "runs.csv").write_text("subject,bold\n01,bold.nii.gz\n")
    cfg = RoiConfig(
        table=tmp_path / "runs.csv",
        run_dir=tmp_path / "run",
        atlas=str(tmp_path / "atlas.nii"),
        reduce="mean",
        cache=False,
        workers=1,
    )
    said: list[str] = []
    summary = roi(cfg, Tight(joined=False, on_event=said.append))
    assert (summary.computed, summary.failed) == (N_REGIONS, {})
    batches = [verdict.batch for verdict in read_all(cfg.run_dir / "memory")]
    assert max(batch or 0 for batch in batches) == N_REGIONS, "all regions at once were too many"
    assert any("was stopped in reading sub-01 at batch 24" in text for text in said)
    assert len((cfg.run_dir / "series.tsv").read_text().splitlines()) == 1 + N_REGIONS


def test_a_dry_run_knows_the_cores_of_ray_before_and_after_it_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = RayRunner(joined=False, on_event=print).machines
    assert [cores for _, cores in own_machine().nodes] == [cores for _, cores in started.nodes]
    command = flags(make_data(tmp_path / "data"), tmp_path / "run", "--runner", "ray", "--dry-run")
    assert main(command) == 0
    workers = min(4, started.places(1.0))
    assert f"memory: {workers} worker(s) of" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
