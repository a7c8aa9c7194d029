"""The worker as an ordinary class: against a plain loop, out of memory, bad images."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from raypipe.backbone import resolve
from raypipe.backbone.model import load
from raypipe.errors import BadImage, ConfigError, InputError, MemoryBudgetExceeded
from raypipe.extract import worker as worker_module
from raypipe.extract.config import ExtractConfig
from raypipe.extract.run import extract
from raypipe.extract.worker import ExtractWorker
from raypipe.read import list_images, read_image
from raypipe.runner import LocalRunner
from raypipe.store import FeatureStore, verify

MakeConfig = Callable[..., ExtractConfig]


def store_of(cfg: ExtractConfig, folder: str = "resnet18_layer4") -> FeatureStore:
    return FeatureStore.open(cfg.output_dir / folder / cfg.data_dir.name / "train.npy")


def test_rows_equal_a_plain_loop(config: MakeConfig) -> None:
    cfg = config(store_dtype="float32", image_size=64)
    extract(cfg, LocalRunner())
    store = store_of(cfg)
    spec = resolve("resnet18", image_size=64)
    model = load(spec, weights="random:0", device="cpu")
    paths = list_images(cfg.data_dir)
    assert store.names == tuple(path.name for path in paths)
    for lo in range(0, len(paths), 4):
        batch = np.stack([spec.preprocess.host(read_image(p).pixels) for p in paths[lo : lo + 4]])
        (tokens,) = model.forward(torch.from_numpy(batch)).values()
        np.testing.assert_array_equal(store[lo : lo + 4], tokens.numpy())
    assert store.valid.all()
    assert verify(store.path).ok


def test_several_layers_share_a_pass_and_resume_apart(config: MakeConfig) -> None:
    cfg = config(backbone="timm:resnet18", layer=("layer2", "layer4"), image_size=64)
    extract(cfg, LocalRunner())
    folders = sorted(p.name for p in cfg.output_dir.iterdir() if p.name != "runs")
    assert len(folders) == 2
    before = {f: store_of(cfg, f).path.read_bytes() for f in folders}
    shutil.rmtree(cfg.output_dir / folders[0])
    extract(cfg, LocalRunner())
    assert {f: store_of(cfg, f).path.read_bytes() for f in folders} == before


def test_a_truncated_image_keeps_its_row_and_is_marked(
    config: MakeConfig, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "photos"
    shutil.copytree(images, damaged)
    bad = damaged / "image-005.png"
    bad.write_bytes(bad.read_bytes()[:2000])
    cfg = config(data_dir=damaged, image_size=64)
    summary = extract(cfg, LocalRunner())
    assert [(name, group) for group, name, _ in summary.bad] == [("image-005.png", "photos/train")]
    assert "1 bad image(s) marked invalid" in capsys.readouterr().err
    store = store_of(cfg)
    assert np.flatnonzero(~store.valid).tolist() == [5]
    assert np.isnan(store[5].astype(np.float32)).all()
    assert np.isfinite(np.delete(np.asarray(store.array, np.float32), 5, axis=0)).all()
    assert "truncated" in store.index.to_pylist()[5]["reason"]
    with pytest.raises(BadImage, match=r"image-005\.png"):
        extract(
            config(data_dir=damaged, output_dir=tmp_path / "strict", on_bad_image="fail"),
            LocalRunner(),
        )


def test_images_of_two_sizes_need_a_size(config: MakeConfig, images: Path, tmp_path: Path) -> None:
    from PIL import Image

    mixed = tmp_path / "mixed"
    mixed.mkdir()
    shutil.copy(images / "image-000.png", mixed)
    Image.new("RGB", (100, 80)).save(mixed / "image-999.png")
    with pytest.raises(InputError, match=r"image-999\.png has 80x100 pixels.*--image-size"):
        extract(config(data_dir=mixed, backbone="dinov2_q"), LocalRunner())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_the_batch_and_goes_on(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    whole = config(image_size=64)
    extract(whole, LocalRunner())
    sizes = []
    forward = ExtractWorker._forward_batch

    def limited(self: ExtractWorker, pixels: np.ndarray) -> dict[str, np.ndarray]:
        sizes.append(len(pixels))
        if len(pixels) > 2:
            raise error
        return forward(self, pixels)

    monkeypatch.setattr(ExtractWorker, "_forward_batch", limited)
    cfg = config(image_size=64, output_dir=whole.output_dir.with_name("halved"))
    summary = extract(cfg, LocalRunner())
    assert sizes.count(4) == 1, "the smaller batch is kept for the rest of the run"
    assert summary.halved
    assert store_of(cfg).manifest["halved"], "the manifest says where"
    np.testing.assert_allclose(
        np.asarray(store_of(cfg).array, np.float32),
        np.asarray(store_of(whole).array, np.float32),
        rtol=2e-3,
        atol=1e-3,
    )


def test_out_of_memory_at_one_image_stops_with_the_remedy(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: ExtractWorker, pixels: np.ndarray) -> dict[str, np.ndarray]:
        raise MemoryError("no room")

    monkeypatch.setattr(ExtractWorker, "_forward_batch", never)
    with pytest.raises(MemoryBudgetExceeded, match=r"one image a batch.*smaller --image-size"):
        extract(config(image_size=64), LocalRunner())


def test_other_errors_of_the_model_are_not_taken_for_memory() -> None:
    assert not worker_module.is_out_of_memory(RuntimeError("shape mismatch"))


def test_a_dry_run_tells_and_writes_nothing(
    config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = config(dry_run=True, image_size=64)
    extract(cfg, LocalRunner())
    out = capsys.readouterr().out
    assert "(48, 4, 512) float16" in out
    assert str(48 * 4 * 512 * 2) in out
    assert not cfg.output_dir.exists()


def test_layer_goes_with_any_model_names_only(config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="--layer goes with timm:NAME"):
        extract(config(layer=("layer2",)), LocalRunner())
