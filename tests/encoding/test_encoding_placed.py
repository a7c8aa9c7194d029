"""Encoding planned from catalogs alone: the stores lie on disks that the driver does not see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoding_kit import FEATURE, World

from raypipe.encoding import EvaluateConfig, FitConfig, ModelConfig, data
from raypipe.encoding.assess import evaluate
from raypipe.encoding.run import fit
from raypipe.errors import StoreError, UnknownName
from raypipe.runner import LocalRunner
from raypipe.store import FeatureStore, declare, find_shards, this_node
from raypipe.train import TrainConfig


def declared(world: World, catalogs: Path, node: str) -> World:
    """``world`` whose features are catalogs of what lies on the disk of ``node``."""
    for shard in find_shards(world.features):
        at = catalogs / shard.relative_to(world.features)
        declare(FeatureStore.open(shard), node, at=at)
    return World(world.data, catalogs)


def config(world: World, run_dir: Path, **changes: Any) -> FitConfig:
    return FitConfig(
        data_dir=world.data,
        features_dir=world.features,
        feature=FEATURE,
        run_dir=run_dir,
        subj=("01",),
        encoder=ModelConfig(d_model=16, heads=2, ffn=16, dropout=0.0),
        train=TrainConfig(epochs=2, batch_size=8, lr=3e-3, schedule="constant"),
        device="cpu",
        **changes,
    )


def losses(run_dir: Path) -> list[float]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "step"]


def test_a_split_opened_by_its_catalog_is_the_stores(world: World, tmp_path: Path) -> None:
    there = world.copy(tmp_path / "disk-of-A")
    seen = declared(there, tmp_path / "catalogs", "A")
    there.features.rename(tmp_path / "not-seen")
    found, whole = (
        data.open_split(world.data, data.StoresIn(root, FEATURE), "01", "train")
        for root in (seen.features, world.features)
    )
    assert found.features.names == whole.features.names and found.shape == whole.shape
    assert found.features.fingerprints() == whole.features.fingerprints()
    assert found.features.identity == whole.features.identity
    np.testing.assert_array_equal(found.valid, whole.valid)
    with pytest.raises(UnknownName, match=f"nearest: {FEATURE}"):
        data.open_split(world.data, data.StoresIn(seen.features, "toy"), "01", "train")


def test_without_ray_the_nodes_are_named_and_a_dry_run_needs_no_rows(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = declared(world, tmp_path / "catalogs", "A")
    fit(config(seen, tmp_path / "run", dry_run=True), None)
    said = capsys.readouterr().out
    assert "36 images to train, 4 to validate" in said
    assert "not foretold here: rows of tokens lie on other nodes' disks" in said
    with pytest.raises(
        StoreError, match=r"lies on the disks of A, not of .*replicate.*--runner ray"
    ):
        fit(config(seen, tmp_path / "run"), LocalRunner())
    assert not (tmp_path / "run").exists()
    fit(config(world, tmp_path / "at-hand"), LocalRunner())
    applied = EvaluateConfig(run_dir=tmp_path / "at-hand", features_dir=seen.features, device="cpu")
    with pytest.raises(StoreError, match="lies on the disks of A"):
        evaluate(applied)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_driver_that_has_catalogs_only_fits_what_one_with_the_stores_does(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raypipe.cluster.runner import RayRunner

    seen = declared(world, tmp_path / "catalogs", this_node())
    monkeypatch.setenv("RAYPIPE_NODE", "the driver's")
    said: list[str] = []
    fit(config(seen, tmp_path / "run"), RayRunner(joined=False, on_event=said.append))
    assert any("row servers start on node" in text and "for tokens" in text for text in said)
    assert "tokens: local copy" in (tmp_path / "run" / "train.log").read_text()
    monkeypatch.delenv("RAYPIPE_NODE")
    fit(config(world, tmp_path / "at-hand"), LocalRunner())
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "at-hand"), rtol=1e-5)
    scalers = [
        {k: v for k, v in torch.load(folder / "best/model.pt").items() if k.startswith("scaler")}
        for folder in (tmp_path / "run", tmp_path / "at-hand")
    ]
    assert scalers[0] and scalers[0].keys() == scalers[1].keys()
    for name, value in scalers[0].items():
        assert torch.equal(value, scalers[1][name]), name
