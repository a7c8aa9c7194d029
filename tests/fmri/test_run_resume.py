"""What is finished is never computed again, what changed is; interrupts, and the run's own config file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from run_kit import (
    AFFINE,
    N_RUNS,
    SHAPE,
    flags,
    mvpa_config,
    run,
    written,
)

from raypipe.cli import main
from raypipe.fmri import work as work_module
from raypipe.runner import Machines

pytestmark = pytest.mark.usefixtures("no_page")


def test_a_finished_unit_is_never_computed_again(
    table: Path, tmp_path: Path, reads: list[str]
) -> None:
    cfg = mvpa_config(table, tmp_path / "run")
    run(cfg)
    assert len(reads) == 2 * N_RUNS, "one pass a scan serves both regions"
    before = written(cfg)
    reads.clear()
    again = run(cfg)
    assert (again.computed, again.found) == (0, 4)
    assert reads == []
    assert written(cfg) == before
    assert len(again.group) == 2, "the group is tested from what is there"


def test_a_changed_option_or_input_is_computed_again(
    table: Path, tmp_path: Path, reads: list[str]
) -> None:
    cfg = mvpa_config(table, tmp_path / "run")
    run(cfg)
    other = replace(cfg, mvpa=replace(cfg.mvpa, scale="centre"))
    assert run(other).computed == 4
    reads.clear()
    events = table.parent / "sub-02_run-1_events.tsv"
    events.write_text(
        events.read_text().replace("cat", "DOG").replace("dog", "cat").replace("DOG", "dog")
    )
    changed = run(other)
    assert (changed.computed, changed.found) == (2, 2)
    assert {name[:6] for name in reads} == {"sub-02"}
    mask = table.parent / "rois" / "no.nii.gz"
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[5] = 1
    nibabel.save(nibabel.Nifti1Image(voxels, AFFINE), mask)
    assert run(other).computed == 2, "both subjects' unit of that region"


def test_a_touched_or_moved_input_is_not(table: Path, tmp_path: Path) -> None:
    cfg = mvpa_config(table, tmp_path / "run")
    run(cfg)
    moved = tmp_path / "elsewhere"
    table.parent.rename(moved)
    for path in moved.rglob("*"):
        path.touch()
    found = run(replace(mvpa_config(moved / table.name, tmp_path / "run")))
    assert (found.computed, found.found) == (0, 4)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C while the ``number``-th unit is being decoded."""
    real: Callable[..., Any] = work_module.design_of
    calls = iter(range(1000))

    def design_of(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(work_module, "design_of", design_of)


def test_ctrl_c_keeps_what_is_finished(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = flags(table, tmp_path / "run")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert main(command) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert len(list((tmp_path / "run" / "units").glob("*.json"))) == 2
    assert main(command) == 0
    assert "2 units in" in capsys.readouterr().err
    summary = json.loads((tmp_path / "run" / "run.json").read_text())["summary"]
    assert (summary["computed"], summary["found"]) == (2, 2)


def test_the_command_line_and_its_own_config_file_are_one_run(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert main([*flags(table, run_dir), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "units: 4, 0 done before, 4 to compute" in told
    assert "predicted peak of a worker" in told
    assert "time: not measured yet" in told
    assert not run_dir.exists()
    assert main(flags(table, run_dir)) == 0
    assert "yes all accuracy: " in capsys.readouterr().out
    assert main(["fmri", "mvpa", "--config", str(run_dir / "config.yaml")]) == 0
    assert "0 units in 0.0 s, 4 were done before" in capsys.readouterr().err
    assert main([*flags(table, run_dir), "--target", "cat,dog", "--dry-run"]) == 0
    assert "by 4 finished units" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("runner", "asked", "workers"), [("local", None, 1), ("ray", None, 3), ("ray", "2", 2)]
)
def test_a_dry_run_states_the_workers_that_the_run_will_have(
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    runner: str,
    asked: str | None,
    workers: int,
) -> None:
    from raypipe.cluster import session

    monkeypatch.setattr(session, "own_machine", lambda: Machines(nodes=(("", 3),)))
    monkeypatch.setattr(session, "is_open", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    more = ["--runner", runner, "--dry-run", *(["--workers", asked] if asked else [])]
    assert main([*flags(table, tmp_path / "run"), *more]) == 0
    assert f"memory: {workers} worker(s) of" in capsys.readouterr().out
    if runner == "local":
        assert main([*flags(table, tmp_path / "run"), *more, "--workers", "2"]) == 2
        assert "--workers 2 needs --runner ray" in capsys.readouterr().err


def test_a_second_run_in_the_same_folder_is_refused(table: Path, tmp_path: Path) -> None:
    from raypipe.errors import StoreLocked
    from raypipe.store.flocks import held

    cfg = mvpa_config(table, tmp_path / "run")
    cfg.run_dir.mkdir()
    with (
        held(cfg.run_dir / ".fmri.lock", "busy"),
        pytest.raises(StoreLocked, match="in use by another run"),
    ):
        run(cfg)
