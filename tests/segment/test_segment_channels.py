"""Channels in pixels or on pages: the same picture from every kind of file, and one way through fit,
evaluate and predict.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import f1_score

from raypipe.cli import main
from raypipe.errors import ConfigError, InputError, RaypipeError
from raypipe.segment import assess, run
from raypipe.segment.apply import logits_of
from raypipe.segment.channels import channel_pages, check_axes
from raypipe.segment.config import InputConfig
from raypipe.segment.pictures import find_pictures
from raypipe.segment.planted import PlantedNucleiConfig, nuclei
from raypipe.segment.readers import Readers
from raypipe.segment.saved import load_model

H, W = 40, 56


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).integers(1, 900, shape).astype(np.uint16)


def ome(path: Path, pixels: np.ndarray, axes: str, **options: Any) -> None:
    tifffile.imwrite(path, pixels, ome=True, metadata={"axes": axes}, **options)


def imagej(path: Path, pixels: np.ndarray, axes: str) -> None:
    tifffile.imwrite(path, pixels, imagej=True, metadata={"axes": axes})


def plain(path: Path, pixels: np.ndarray, axes: str, **options: Any) -> None:
    tifffile.imwrite(path, pixels, photometric="minisblack", metadata=None, **options)


def colour(path: Path, pixels: np.ndarray, axes: str) -> None:
    tifffile.imwrite(path, np.moveaxis(pixels, 0, -1), photometric="rgb", metadata=None)


def planar(path: Path, pixels: np.ndarray, axes: str) -> None:
    tifffile.imwrite(
        path, pixels, photometric="rgb", planarconfig="separate", metadata=None
    )  # fmt: skip


def pair(folder: Path, write: Callable[..., None], pixels: np.ndarray, axes: str, n: int) -> Path:
    """One image with a mask of ``n`` pages."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    write(folder / "images/a.tif", pixels, axes)
    mask = noise(n, H, W) % 2
    tifffile.imwrite(folder / "masks/a.tif", mask[0] if n == 1 else mask, photometric="minisblack")
    return folder


@pytest.mark.parametrize(
    ("write", "axes"),
    [(ome, None), (imagej, None), (planar, None), (colour, None), (plain, "CYX"), (ome, "cyx")],
)
def test_every_kind_of_file_gives_the_same_picture(tmp_path: Path, write: Any, axes: Any) -> None:
    pixels = noise(3, H, W)
    folder = pair(tmp_path, write, pixels, "CYX", 1)
    (picture,) = find_pictures(folder, InputConfig(data=folder, axes=axes).axes)
    assert (picture.channels, picture.frame, picture.shape) == (3, 0, (H, W))
    readers = Readers()
    found = readers.image(picture, (3, 30), (5, 50))
    assert found.dtype == np.uint16 and readers.dtype(picture) == np.uint16
    np.testing.assert_array_equal(found, pixels[:, 3:30, 5:50])


@pytest.mark.parametrize(
    ("write", "said", "named"),
    [(ome, "TCYX", None), (ome, "CTYX", None), (imagej, "TCYX", None), (ome, "ZCYX", None),
     (plain, "TCYX", "CYX"), (ome, "CTYX", "CFYX"), (ome, "TCYX", "FCYX")],
)  # fmt: skip
def test_a_stack_of_several_channels(tmp_path: Path, write: Any, said: str, named: Any) -> None:
    frames, channels = 2, 3
    pixels = noise(frames, channels, H, W)
    stored = pixels if said.index("C") else pixels.swapaxes(0, 1)
    if write is plain:  # of which nothing says that there are two axes before Y
        frames, pixels, stored = 1, pixels.reshape(1, 6, H, W), pixels.reshape(6, H, W)
    folder = pair(tmp_path, write, np.ascontiguousarray(stored), said, frames)
    found = find_pictures(folder, named)
    assert [p.frame for p in found] == list(range(frames))
    readers = Readers()
    for picture, wanted in zip(found, pixels, strict=True):
        assert picture.channels == len(wanted)
        np.testing.assert_array_equal(readers.image(picture, (0, H), (2, 9)), wanted[:, :, 2:9])
        assert readers.mask(picture, (0, H), (0, W)).shape == (H, W)


def test_values_that_are_no_pages_are_named_as_for_predict(tmp_path: Path) -> None:
    """A float array of (h, w, 3) is written as h pages of w x 3."""
    pixels = np.random.default_rng(0).random((H, W, 3), np.float32)
    folder = pair(tmp_path, plain, pixels, "", 1)
    (picture,) = find_pictures(folder, "YXC")
    found = Readers().image(picture, (1, 9), (2, 30))
    np.testing.assert_array_equal(found, pixels.transpose(2, 0, 1)[:, 1:9, 2:30])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_pages_are_counted_as_c_order_counts_them(lead: list[int], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(lead) - 1))
    found = channel_pages(tuple(lead), at)
    others = [n for place, n in enumerate(lead) if place != at]
    for number, place in enumerate(np.ndindex(*others)):
        for channel in range(lead[at]):
            where = [*place[:at], channel, *place[at:]]
            assert found[number, channel] == np.ravel_multi_index(where, lead)


def png(path: Path, pixels: np.ndarray, axes: str) -> None:
    Image.fromarray(np.moveaxis(pixels, 0, -1).astype(np.uint8)).save(path, "PNG")


@pytest.mark.parametrize(
    ("write", "said", "n", "axes", "kind", "told"),
    [
        (plain, "", 1, None, InputError, r"3 x 40 x 56, its mask a\.tif 1 x .*say --axes CYX$"),
        (ome, "CYX", 3, None, InputError, r"pictures and no channels, say --axes FYX$"),
        (plain, "", 1, "YX", ConfigError, r"a\.tif: axes 'YX' do not fit .*\(3, 40, 56\)"),
        (plain, "", 2, "CYX", InputError, r"1 x 40 x 56 x 3, its mask a\.tif 2 x "),
        (png, "", 1, "YXC", ConfigError, r"axes 'YXC' are of TIFF files; leave them out for a\.tif"),
    ],
)  # fmt: skip
def test_what_can_be_read_in_two_ways_is_asked(
    tmp_path: Path, write: Any, said: str, n: int, axes: Any, kind: type[RaypipeError], told: str
) -> None:
    folder = pair(tmp_path, write, noise(3, H, W), said, n)
    with pytest.raises(kind, match=told) as raised:
        find_pictures(folder, axes)
    assert "\n" not in str(raised.value)


def test_pages_that_are_said_to_be_channels_may_be_named_frames(tmp_path: Path) -> None:
    pixels = noise(3, H, W)
    found = find_pictures(pair(tmp_path, ome, pixels, "CYX", 3), "FYX")
    assert [(p.frame, p.channels) for p in found] == [(0, 1), (1, 1), (2, 1)]
    for picture, page in zip(found, pixels, strict=True):
        np.testing.assert_array_equal(Readers().image(picture, (0, H), (0, W))[0], page)


def test_channels_in_two_places_are_asked(tmp_path: Path) -> None:
    def both(path: Path, pixels: np.ndarray, axes: str) -> None:
        ome(path, pixels.astype(np.uint8), axes, photometric="rgb")

    pixels = noise(2, H, W, 3)
    folder = pair(tmp_path, both, pixels, "CYXS", 1)
    with pytest.raises(InputError, match=r"channels in two places \(axes CYXS"):
        find_pictures(folder)


@pytest.mark.parametrize("axes", ["CZYX", "CY", "YYX", "XYQ"])
def test_axes_are_of_four_letters(tmp_path: Path, axes: str) -> None:
    with pytest.raises(ConfigError, match=r"of F \(frames\) C Y X"):
        InputConfig(data=tmp_path, axes=axes)
    assert check_axes("fcyx") == "FCYX"


def test_mixed_kinds_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pair(tmp_path, ome, noise(3, H, W), "CYX", 1)
    for name, kind in (("images", noise(H, W)), ("masks", noise(H, W) % 2)):
        tifffile.imwrite(folder / name / "b.tif", kind)
    args = ["--data", str(folder), "--run-dir", str(tmp_path / "run"), "--runner", "local"]
    assert main(["segment", "fit", *args]) == 2
    assert "b.tif page 0 [0:40, 0:56] has 1 channels, a.tif" in capsys.readouterr().err


@pytest.mark.parametrize(("write", "axes"), [(plain, ["--axes", "CYX"]), (imagej, [])])
def test_fit_evaluate_and_predict_see_the_same_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, axes: list[str]
) -> None:
    for module in (run, assess):
        monkeypatch.setattr(module, "write_report", lambda run_dir: run_dir / "report.html")
    planted, images = PlantedNucleiConfig(size=64), {}
    for number, split in enumerate(("train", "val", "test")):
        counts, mask = nuclei(planted, (number,))
        images[split] = np.stack([noise(64, 64), counts, counts // 2 + 7])
        for kind in ("images", "masks"):
            (tmp_path / split / kind).mkdir(parents=True)
        write(tmp_path / split / "images/a.tif", images[split], "CYX")
        tifffile.imwrite(tmp_path / split / "masks/a.tif", mask)
    out = tmp_path / "run"
    fit = ["--data", str(tmp_path), "--run-dir", str(out), "--crop", "32", "--width", "4", *axes]
    fit += ["--depth", "2", "--epochs", "2", "--device", "cpu", "--runner", "local"]
    assert main(["segment", "fit", *fit]) == 0
    low = json.loads((out / "model.json").read_text())["normalisation"]["low"]
    assert low == [np.percentile(page, 1, method="lower") for page in images["train"]]
    assert main(["segment", "evaluate", "--run-dir", str(out), "--device", "cpu"]) == 0
    summary = json.loads((out / "evaluation/test/summary.json").read_text())
    for what in ("logits", "labels"):
        ask = ["--input", str(tmp_path / "test/images/a.tif"), "--axes", "CYX", "--what", what]
        ask += ["--output", str(tmp_path / f"{what}.npy"), "--run-dir", str(out)]
        assert main(["segment", "predict", *ask, "--device", "cpu", "--runner", "local"]) == 0
    module, saved = load_model(out)
    wanted = logits_of(module, saved, images["test"])[0]
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), wanted[0], rtol=0, atol=1e-5)
    truth = tifffile.imread(tmp_path / "test/masks/a.tif").ravel() > 0
    dice = f1_score(truth, np.load(tmp_path / "labels.npy").ravel())
    assert summary["pixels"]["dice"] == pytest.approx(dice, abs=1e-3)
