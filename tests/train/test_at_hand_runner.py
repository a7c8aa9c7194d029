"""The runner without Ray reads its node's copies, and says so; what lies elsewhere is refused first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from train_helpers import ToyTask, config, losses, write_toy

from raypipe.errors import StoreError
from raypipe.runner import LocalRunner
from raypipe.store import FeatureStore, adopt, declare, plan_adoption, stand_in
from raypipe.stream import ArraySource


@dataclass(frozen=True)
class PlacedTask(ToyTask):
    """Its images by a catalog in a folder that holds nothing else."""

    catalogs: Path = Path()

    def sources(self) -> Mapping[str, ArraySource]:
        placed = ArraySource.of_locator(stand_in(self.catalogs / "x.npy"))
        return {**super().sources(), "x": placed}


def test_a_copy_of_this_node_trains_as_the_file_does_and_one_elsewhere_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy, cfg = write_toy(tmp_path / "toy"), config(epochs=2)
    LocalRunner().fit(toy, cfg, tmp_path / "plain", device="cpu")
    assert "local copy" not in (tmp_path / "plain" / "train.log").read_text()
    there = tmp_path / "disk" / "x.npy"
    there.parent.mkdir()
    there.write_bytes((toy.data / "x.npy").read_bytes())
    adopt(plan_adoption(there))
    declare(FeatureStore.open(there), "A", at=tmp_path / "catalogs" / "x.npy")
    task = PlacedTask(data=toy.data, catalogs=tmp_path / "catalogs")
    monkeypatch.setenv("RAYPIPE_NODE", "C")
    with pytest.raises(StoreError, match=r"x.npy lies on the disks of A, not of C"):
        LocalRunner().fit(task, cfg, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("RAYPIPE_NODE", "A")
    LocalRunner().fit(task, cfg, tmp_path / "run", device="cpu")
    assert f"x: local copy {there}" in (tmp_path / "run" / "train.log").read_text()
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
