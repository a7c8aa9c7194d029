"""Channels in pixels or on pages: the same picture from every kind of file, and one way through fit,
evaluate and predict.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from channel_files import H, W, as_planes, colour, imagej, noise, ome, pair, plain, planar
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from raypipe.cli import main
from raypipe.segment import assess, run
from raypipe.segment.apply import logits_of
from raypipe.segment.channels import (
    axes_taken,
    channel_pages,
    open_tiles,
)
from raypipe.segment.config import InputConfig
from raypipe.segment.pictures import find_pictures
from raypipe.segment.planted import PlantedNucleiConfig, nuclei
from raypipe.segment.readers import Readers
from raypipe.segment.saved import load_model
from raypipe.tile.files import files_of


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


@pytest.mark.parametrize(
    ("write", "said", "named", "taken"),
    [(ome, "TCYX", None, "FCYX"), (ome, "CTYX", None, "CFYX"), (imagej, "TZCYX", None, "FFCYX"),
     (ome, "CTZYX", None, "CFFYX"), (ome, "TCYX", "FCYX", "FCYX"), (plain, "CYX", "CYX", "CYX"),
     (imagej, "CYX", None, "CYX"), (planar, "CYX", None, "CYX"), (colour, "CYX", None, "YXC"),
     (plain, "TYX", None, "FYX"), (ome, "TZYX", None, "FYX"), (imagej, "TZCYX", "FFCYX", "FFCYX")],
)  # fmt: skip
def test_tiles_are_cut_from_the_pictures_that_fit_sees(
    tmp_path: Path, write: Any, said: str, named: Any, taken: str
) -> None:
    sizes = [{"C": 3, "T": 2, "Z": 5}[letter] for letter in said[:-2]]
    folder = tmp_path / "data"
    folder.mkdir()
    n = int(np.prod(sizes)) // (3 if "C" in said else 1)
    pictures = find_pictures(pair(folder, write, noise(*sizes, H, W), said, n), named)
    path = folder / "images/a.tif"
    source = pickle.loads(pickle.dumps(open_tiles(path, named)))
    assert (source.frames, source.channels, source.space) == (n, pictures[0].channels, (H, W))
    assert source.dtype == np.uint16 and axes_taken(source) == taken
    assert files_of(source) == (path,), "else it could be overwritten, and a change not seen"
    again, readers = open_tiles(path, taken), Readers()
    assert axes_taken(again) == taken and again.frames == n, "what it says is taken as axes"
    assert [p.channels for p in find_pictures(folder, taken)] == [source.channels] * n
    for picture in pictures:
        box = slice(3, 30), slice(5, 50)
        wanted = readers.image(picture, (3, 30), (5, 50))
        np.testing.assert_array_equal(source.read(picture.frame, box), wanted)
        np.testing.assert_array_equal(again.read(picture.frame, box), wanted)


def test_a_set_of_a_file_a_channel_is_predicted_as_it_was_fitted(tmp_path: Path) -> None:
    """Fit reads each file's own planes, of one channel; predict the set, of two."""
    planes = noise(2, 3, H, W)
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    ids = [f"{k}bc0e5c2-7d30-4c58-9a1c-000000000000" for k in range(2)]
    where = "".join(
        f'<TiffData FirstC="{c}" FirstZ="{z}" IFD="{z}" PlaneCount="1"><UUID FileName="c{c}.ome.tif">'
        f"urn:uuid:{ids[c]}</UUID></TiffData>"
        for c in range(2)
        for z in range(3)
    )
    for c in range(2):
        xml = (
            '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas'
            f'/OME/2016-06" UUID="urn:uuid:{ids[c]}"><Image ID="Image:0"><Pixels ID="Pixels:0" '
            f'SizeX="{W}" SizeY="{H}" SizeZ="3" SizeC="2" SizeT="1" DimensionOrder="XYZCT" '
            f'Type="uint16">{where}</Pixels></Image></OME>'
        )
        name = f"c{c}.ome.tif"
        with tifffile.TiffWriter(tmp_path / "images" / name) as tif:
            for z, page in enumerate(planes[c]):
                about = None if z else xml
                tif.write(page, contiguous=False, metadata=None, description=about)
        tifffile.imwrite(tmp_path / "masks" / name, planes[c] % 2, photometric="minisblack")
    found = find_pictures(tmp_path)
    assert [p.channels for p in found] == [1] * 6
    path = tmp_path / "images/c0.ome.tif"
    assert open_tiles(path).channels == 2
    for source in (open_tiles(path, None, 1), open_tiles(path, "FYX")):
        assert (source.frames, source.channels, axes_taken(source)) == (6, 1, "FYX")
        for frame, picture in enumerate(found):
            tile = source.read(frame, (slice(0, H), slice(0, W)))
            wanted = Readers().image(picture, (0, H), (0, W))
            np.testing.assert_array_equal(tile, wanted)


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


def test_mixed_kinds_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pair(tmp_path, ome, noise(3, H, W), "CYX", 1)
    for name, kind in (("images", noise(H, W)), ("masks", noise(H, W) % 2)):
        tifffile.imwrite(folder / name / "b.tif", kind)
    args = ["--data", str(folder), "--run-dir", str(tmp_path / "run"), "--runner", "local"]
    assert main(["segment", "fit", *args]) == 2
    assert "b.tif page 0 [0:40, 0:56] has 1 channels, a.tif" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("write", "axes"), [(plain, ["--axes", "CYX"]), (imagej, []), (as_planes, ["--axes", "CYX"])]
)
def test_fit_evaluate_and_predict_see_the_same_channels(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    write: Any,
    axes: list[str],
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
        ask = ["--input", str(tmp_path / "test/images/a.tif"), *axes, "--what", what]
        ask += ["--output", str(tmp_path / f"{what}.npy"), "--run-dir", str(out)]
        ask += ["--device", "cpu", "--runner", "local"]
        capsys.readouterr()
        assert main(["segment", "predict", *ask, "--dry-run"]) == 0
        told = capsys.readouterr().out.splitlines()[0]
        assert "1 image(s) of 64x64, 3 channel(s)" in told and "axes taken to be CYX" in told
        assert main(["segment", "predict", *ask]) == 0
        record = json.loads((tmp_path / f"{what}.npy.predict/run.json").read_text())
        assert record["input"]["axes"] == "CYX" and len(record["input"]["files"]) == 1
    module, saved = load_model(out)
    wanted = logits_of(module, saved, images["test"])[0]
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), wanted[0], rtol=0, atol=1e-5)
    truth = tifffile.imread(tmp_path / "test/masks/a.tif").ravel() > 0
    dice = f1_score(truth, np.load(tmp_path / "labels.npy").ravel())
    assert summary["pixels"]["dice"] == pytest.approx(dice, abs=1e-3)


def test_a_run_from_before_channels_were_read_is_told_so(
    tmp_path: Path, no_page: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its pages were pictures, and its pictures.json names no axes."""
    data, out = tmp_path / "data", tmp_path / "run"
    for number, split in enumerate(("train", "val", "test")):
        drawn = [nuclei(PlantedNucleiConfig(size=64), (number, k)) for k in range(2)]
        for place, (kind, write) in enumerate((("images", ome), ("masks", plain))):
            (data / split / kind).mkdir(parents=True)
            pixels = np.stack([one[place] for one in drawn])
            write(data / split / kind / "a.tif", pixels, "CYX")
    fit = ["--data", str(data), "--run-dir", str(out), "--crop", "16", "--width", "2", "--axes"]
    fit += ["FYX", "--depth", "2", "--epochs", "1", "--device", "cpu", "--runner", "local"]
    assert main(["segment", "fit", *fit]) == 0
    path = out / "pictures.json"
    fields = json.loads(path.read_text())
    for one in fields["pictures"]:
        del one["axes"]
    path.write_text(json.dumps(fields))
    capsys.readouterr()
    assert main(["segment", "evaluate", "--run-dir", str(out), "--device", "cpu"]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("raypipe: ")]
    assert "was fitted as 1 channel(s)" in line and "--axes FYX" in line
