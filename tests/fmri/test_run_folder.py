"""A run folder belongs to one command, and a unit removes no map but its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_kit import mvpa_config, unit

from raypipe.errors import ConfigError
from raypipe.fmri import commands
from raypipe.fmri.weight_files import save_weights
from raypipe.report.saved import RUN_FILE, write_json
from raypipe.runner import LocalRunner


def test_another_command_is_refused_in_a_run_folder(tmp_path: Path) -> None:
    cfg = mvpa_config(tmp_path / "runs.csv", tmp_path / "run")
    commands.check_kind(cfg, "fmri mvpa")  # nothing is there yet
    write_json(cfg.run_dir / RUN_FILE, {"kind": "fmri mvpa"})
    commands.check_kind(cfg, "fmri mvpa")
    words = r"run holds results of fmri mvpa; give fmri searchlight a --run-dir of its own"
    with pytest.raises(ConfigError, match=words):
        commands.check_kind(cfg, "fmri searchlight")


def test_the_refusal_leaves_the_folder_as_it_was(
    tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = mvpa_config(table, tmp_path / "run")
    write_json(first.run_dir / RUN_FILE, {"kind": "fmri searchlight"})
    before = (first.run_dir / RUN_FILE).read_bytes()
    monkeypatch.setattr(commands, "_save_run", lambda *given: pytest.fail("run.json is rewritten"))
    with pytest.raises(ConfigError, match="holds results of fmri searchlight"):
        commands.mvpa(first, LocalRunner())
    assert (first.run_dir / RUN_FILE).read_bytes() == before


def test_only_weight_maps_of_before_go(tmp_path: Path) -> None:
    one, maps = unit(), tmp_path / "maps"
    maps.mkdir()
    own = [
        f"{one.unit_id}_{kind}.{end}"
        for kind in ("weights", "pattern")
        for end in ("nii.gz", "json")
    ]
    others = [f"{one.unit_id}_accuracy_searchlight.nii.gz", f"{one.unit_id}_accuracy_logp.json"]
    for name in (*own, *others):
        (maps / name).touch()
    save_weights(tmp_path, one, None, None)  # type: ignore[arg-type]
    assert sorted(path.name for path in maps.iterdir()) == sorted(others)
