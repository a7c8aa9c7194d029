"""docs/data-plane.md: its Python runs as it stands, its flags are the commands'."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from raypipe import config
from raypipe.encoding.split import LISTED_ROWS
from raypipe.store.place_commands import PlaceConfig
from raypipe.train import TrainConfig

TEXT = (Path(__file__).parents[1] / "docs" / "data-plane.md").read_text(encoding="utf-8")


def test_the_loop_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "features" / "dinov2_q_last" / "01"
    folder.mkdir(parents=True)
    np.save(folder / "train.npy", np.ones((40, 3, 4), np.float16))
    np.save(tmp_path / "lh_training_fmri.npy", np.zeros((40, 5), np.float32))
    (block,) = re.findall(
        r"```python\n(from raypipe.stream import FeatureLoader\n.*?)```", TEXT, re.S
    )
    names: dict[str, object] = {}
    exec(block, names)
    assert float(names["loss"]) == 1.0  # type: ignore[arg-type]
    assert names["state"]["epoch"] == 2  # type: ignore[index]


def test_the_split_runs() -> None:
    (block,) = re.findall(r"```python\n(from raypipe.stream import split_rows\n.*?)```", TEXT, re.S)
    names: dict[str, object] = {}
    exec(block, names)
    assert f"({LISTED_ROWS:,})" in TEXT
    assert len(names["train"]) + len(names["val"]) == 10**9  # type: ignore[arg-type]


def test_the_flags_are_there() -> None:
    (line,) = re.findall(r"raypipe store place (/nvme.*)", TEXT)
    assert config.parse(PlaceConfig, line.split(), prog="p").catalog == Path("/shared/catalogs")
    assert "`--shuffle-window`" in TEXT and TrainConfig(shuffle_window=9).shuffle_window == 9
