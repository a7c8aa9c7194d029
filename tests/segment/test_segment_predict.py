"""``raypipe segment predict`` against the network on the whole picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from raypipe.cli import main
from raypipe.segment.apply import logits_of
from raypipe.segment.metrics import predict_labels
from raypipe.segment.model import UNetConfig, build_model
from raypipe.segment.normalise import Normalisation
from raypipe.segment.predict import after_of
from raypipe.segment.saved import SavedModel, load_model, save_model
from raypipe.train import checkpoint


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two wait for each other by spinning when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fitted(tmp_path: Path) -> Path:
    """A run folder as fit leaves it, of a network with random weights."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    spec = UNetConfig(width=4, depth=3)
    how = Normalisation(kind="minmax", low=(10.0,), high=(250.0,))
    saved = SavedModel(
        spec=spec, normalisation=how, target="foreground", classes=2, ignore=None, seed=1
    )
    save_model(run_dir, saved)
    model = build_model(spec, 1).eval()
    with torch.inference_mode():
        middle = model(torch.rand(1, 1, 64, 64)).sigmoid().median()
    state = {"model": model.state_dict()}
    history = [{"epoch": 3, "val_threshold": float(middle)}]
    checkpoint.save(run_dir, "best", state, {"progress": {"history": history}})
    return run_dir


def stack(tmp_path: Path) -> np.ndarray:
    pages = np.random.default_rng(0).integers(0, 255, (2, 301, 277), np.uint8)
    tifffile.imwrite(tmp_path / "in.tif", pages, photometric="minisblack", compression="zlib")
    return pages


@pytest.mark.parametrize("what", ["labels", "probabilities", "logits"])
def test_every_page_is_what_the_whole_picture_gives(
    fitted: Path, tmp_path: Path, what: str
) -> None:
    pages = stack(tmp_path)
    out = tmp_path / "out.ome.tif"
    args = ["--run-dir", str(fitted), "--input", str(tmp_path / "in.tif"), "--output", str(out)]
    args += ["--what", what, "--chunk-size", "160", "--runner", "local", "--device", "cpu"]
    assert main(["segment", "predict", *args]) == 0
    module, saved = load_model(fitted)
    for page, got in zip(pages, tifffile.imread(out), strict=True):
        logits = logits_of(module, saved, page[None])
        if what == "labels":
            wanted = predict_labels(logits, saved.threshold)[0].numpy()
            assert got.dtype == np.uint8 and np.array_equal(got, wanted) and 0 < got.mean() < 1
        else:
            wanted = (logits if what == "logits" else logits.sigmoid())[0, 0].numpy()
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


def test_an_image_of_other_channels_is_refused(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "rgb.npy", np.zeros((64, 64, 3), np.uint8))
    args = ["--run-dir", str(fitted), "--input", str(tmp_path / "rgb.npy"), "--axes", "YXC"]
    args += ["--output", str(tmp_path / "out.npy"), "--runner", "local"]
    assert main(["segment", "predict", *args]) == 2
    assert "has 3 channel(s)" in capsys.readouterr().err
    assert not (tmp_path / "out.npy").exists()


def test_the_input_is_never_the_output(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = stack(tmp_path)
    path = str(tmp_path / "in.tif")
    args = ["--run-dir", str(fitted), "--input", path, "--output", path, "--runner", "local"]
    assert main(["segment", "predict", *args, "--overwrite"]) == 2
    assert "is the input itself" in capsys.readouterr().err
    assert np.array_equal(tifffile.imread(path), pages)


@pytest.mark.parametrize("classes", [256, 257, 700])
def test_labels_of_many_classes_do_not_wrap(classes: int) -> None:
    spec = UNetConfig(width=2, depth=2, classes=classes)
    saved = SavedModel(
        spec=spec,
        normalisation=Normalisation(kind="none", low=(0.0,), high=(1.0,)),
        target="classes",
        classes=classes,
        ignore=None,
        seed=0,
    )
    logits = torch.zeros(1, classes, 2, 3)
    logits[0, -1] = 1
    after = after_of("labels", saved)
    assert after is not None
    labels = after(logits).numpy()
    assert labels.dtype == (np.uint8 if classes == 256 else np.uint16)
    assert (labels == classes - 1).all() and labels.shape == (1, 1, 2, 3)
