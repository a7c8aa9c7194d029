"""The worker as an ordinary class: against a plain loop, out of memory, bad images."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raypipe.backbone import resolve
from raypipe.backbone.model import load
from raypipe.errors import (
    BadImage,
    ConfigError,
    FingerprintMismatch,
    InputError,
    MemoryBudgetExceeded,
    NoSpace,
    StoreError,
)
from raypipe.extract import worker as worker_module
from raypipe.extract.checks import check_unfinished
from raypipe.extract.config import ExtractConfig
from raypipe.extract.plan import RangeItem
from raypipe.extract.run import extract
from raypipe.extract.worker import ExtractWorker, Shared, WorkerSetup
from raypipe.read import list_images, read_image
from raypipe.runner import Done, LocalRunner
from raypipe.store import FeatureStore, ShardWriter, verify

pytestmark = pytest.mark.usefixtures("no_page")
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
    assert f"({128 + 48 * 4 * 512 * 2} bytes)" in out, "the header of 128 bytes included"
    assert not cfg.output_dir.exists()


def test_a_dry_run_says_what_is_there_and_what_would_be_refused(
    config: MakeConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(**options: object) -> str:
        capsys.readouterr()
        extract(config(dry_run=True, image_size=64, **options), None)
        return capsys.readouterr().out

    assert "float16  192 KiB  new" in told()
    stop = ExtractWorker.step

    def dies(self: ExtractWorker, item: RangeItem, upcoming: RangeItem | None) -> list[Done]:
        if item.lo >= 24:
            self.drain()
            raise RuntimeError("power cut")
        return stop(self, item, upcoming)

    monkeypatch.setattr(ExtractWorker, "step", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        extract(config(image_size=64), LocalRunner())
    monkeypatch.undo()
    assert "24 of 48 rows done, will be resumed" in told()
    extract(config(image_size=64), LocalRunner())
    finished = told()
    assert "  finished\n" in finished
    assert "journals and index included: 0 B" in finished
    refused = told(batch_size=8)
    assert "REFUSED" in refused
    assert "--batch-size" in refused
    assert "will be replaced" in told(batch_size=8, overwrite=True)


def test_layer_goes_with_any_model_names_only(config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match="--layer goes with timm:NAME"):
        extract(config(layer=("layer2",)), LocalRunner())


def test_a_mended_image_is_noticed_and_extracted_again_on_request(
    config: MakeConfig, images: Path, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(images, photos)
    bad = photos / "image-003.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:1500])
    cfg = config(data_dir=photos, image_size=64)
    assert len(extract(cfg, LocalRunner()).bad) == 1
    assert len(extract(cfg, LocalRunner()).bad) == 1, "the same command finds its work done"
    bad.write_bytes(whole)
    with pytest.raises(StoreError, match=r"1 image\(s\) changed since, first image-003\.png"):
        extract(cfg, LocalRunner())
    assert not extract(replace(cfg, overwrite=True), LocalRunner()).bad
    assert store_of(cfg).valid.all()


def test_an_image_that_this_machine_cannot_open_stops_the_run(
    config: MakeConfig, images: Path, tmp_path: Path
) -> None:
    """A folder that is not mounted here must not become a store of unreadable images."""
    photos = tmp_path / "photos"
    shutil.copytree(images, photos)
    (photos / "image-030.png").unlink()
    (photos / "image-030.png").symlink_to(tmp_path / "elsewhere.png")
    cfg = config(data_dir=photos, image_size=64)
    with pytest.raises(InputError, match=r"cannot open .*image-030\.png.*mounts"):
        extract(cfg, LocalRunner())
    assert not list(cfg.output_dir.rglob("train.npy"))


def test_relative_paths_mean_the_drivers_folder(
    config: MakeConfig, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images.parent)
    cfg = config(data_dir=Path(images.name), image_size=64)
    summary = extract(cfg, LocalRunner())
    assert all(Path(store).is_absolute() for store in summary.stores)


def test_a_failed_write_is_never_reported_as_done(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ShardWriter.write

    def full(self: ShardWriter, lo: int, *args: object, **options: object) -> None:
        if lo == 44:  # the last cell
            raise NoSpace("needs 4096 bytes, 0 free; make room")
        write(self, lo, *args, **options)  # type: ignore[arg-type]

    cfg = config(image_size=64)
    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "write", full)
        with pytest.raises(NoSpace):
            extract(cfg, LocalRunner())
    extract(cfg, LocalRunner())
    assert verify(store_of(cfg).path).ok


def test_a_worker_with_other_weights_is_refused(images: Path) -> None:
    setup = WorkerSetup(
        spec=resolve("resnet18", image_size=64),
        weights="random:0",
        device="cpu",
        precision="fp32",
        torch_threads=None,
        decode_threads=1,
        fail_on_bad_image=False,
        image_hw=(256, 256),
    )
    worker = setup()
    with pytest.raises(InputError, match="other weights"):
        worker.open(Shared({}, "0" * 64))
    worker.close()


def test_a_store_begun_on_another_device_is_not_mixed(
    config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(image_size=64)

    def die(self: ExtractWorker, pixels: np.ndarray) -> dict[str, np.ndarray]:
        raise ValueError("stopped on purpose")

    with monkeypatch.context() as patched:
        patched.setattr(ExtractWorker, "_forward_batch", die)
        with pytest.raises(ValueError, match="on purpose"):
            extract(cfg, LocalRunner())
    path = cfg.output_dir / "resnet18_layer4" / cfg.data_dir.name / "train.npy"
    check_unfinished(path, "cpu", overwrite=False)
    with pytest.raises(FingerprintMismatch, match="begun on cpu, this run computes on cuda"):
        check_unfinished(path, "cuda", overwrite=False)


def test_local_runs_leave_no_files_open(config: MakeConfig) -> None:
    extract(config(image_size=64), LocalRunner())
    before = set(Path("/proc/self/fd").iterdir())
    out = config().output_dir
    extract(config(image_size=64, output_dir=out.with_name("second")), LocalRunner())
    assert len(set(Path("/proc/self/fd").iterdir())) <= len(before)


def test_less_memory_ends_at_one_image() -> None:
    item = RangeItem("01/train", 0, 6, 4, ())
    batches = []
    with pytest.raises(MemoryBudgetExceeded, match="one image a batch"):
        while True:
            item = item.with_less_memory()
            batches.append(item.batch_limit)
    assert batches == [2, 1]
