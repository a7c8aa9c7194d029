"""Channels in pixels or on pages: the same picture from every kind of file, and one way through fit,
evaluate and predict.
"""

from __future__ import annotations

import json
import pickle
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
from raypipe.segment.channels import (
    axes_taken,
    channel_pages,
    check_axes,
    open_pixels,
    open_tiles,
    said_otherwise,
    ways,
)
from raypipe.segment.config import InputConfig
from raypipe.segment.pictures import Picture, find_pictures
from raypipe.segment.planted import PlantedNucleiConfig, nuclei
from raypipe.segment.readers import Readers
from raypipe.segment.saved import load_model
from raypipe.tile.files import files_of
from raypipe.tile.source import digest, open_source

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


def rgb(path: Path, pixels: np.ndarray, axes: str) -> None:
    ome(path, pixels.astype(np.uint8), axes, photometric="rgb")


def as_planes(path: Path, pixels: np.ndarray, axes: str) -> None:
    """Channels that the file calls Z, as many save them."""
    imagej(path, pixels, "ZYX")


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


@pytest.mark.parametrize(
    ("write", "said", "axes"),
    [
        (ome, "TCYX", "CFYX"),
        (imagej, "TCYX", "CFYX"),
        (ome, "CTYX", "FCYX"),
        (colour, "CYX", "CYX"),
    ],
)
def test_axes_that_move_what_a_file_calls_channels_are_refused_where_files_are_listed(
    tmp_path: Path, write: Any, said: str, axes: str
) -> None:
    """Two times, two channels and a square: every reading fits the mask."""
    sizes = {"T": 2, "Z": 2, "C": 2 if "T" in said else 3, "Y": 48, "X": 48}
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    path = tmp_path / "images/a.tif"
    write(path, noise(*(sizes[letter] for letter in said)), said)
    mask = noise(2, 48, 48) % 2
    tifffile.imwrite(tmp_path / "masks/a.tif", mask, photometric="minisblack")
    for read in (lambda: find_pictures(tmp_path, axes), lambda: open_tiles(path, axes)):
        with pytest.raises(ConfigError, match=f"axes '{axes}' are not those of a.tif, which says"):
            read()
    n = open_pixels(path, axes).shape[-1]
    picture = Picture(image=path, mask=path, frame=0, rows=(0, 48), cols=(0, 48), split="", channels=n,
                      axes=axes)  # fmt: skip
    found = Readers().image(picture, (0, 3), (0, 3))
    assert len(found) == n, "an earlier run, fitted so, is evaluated and goes on"


@pytest.mark.parametrize(
    ("write", "said", "axes"),
    [(ome, "ZYX", "CYX"), (imagej, "TYX", "CYX"), (ome, "TZYX", "FCYX"), (ome, "TYX", "FXY")],
)
def test_what_is_named_wins_over_a_file_that_says_no_channels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write: Any, said: str, axes: str
) -> None:
    """Channels saved as planes are common; they are told once for all such files."""
    sizes = {"T": 2, "Z": 3, "Y": 48, "X": 48}
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    pixels = noise(*(sizes[letter] for letter in said))
    n = 2 if "F" in axes else 1
    for name in ("a.tif", "b.tif"):
        write(tmp_path / "images" / name, pixels, said)
        mask = noise(n, 48, 48) % 2
        tifffile.imwrite(tmp_path / "masks" / name, mask, photometric="minisblack", metadata=None)
    found = find_pictures(tmp_path, axes)
    told = f"the file says {said}, taken as {axes} as asked"
    assert capsys.readouterr().err == f"a.tif and 1 more: {told}\n"
    source = open_tiles(tmp_path / "images/a.tif", axes)
    assert said_otherwise(source, "as asked") == told
    order = [axes.index(letter) for letter in "FCYX" if letter in axes]
    wanted = pixels.transpose(order).reshape(n, -1, 48, 48)
    for picture in found[:n]:
        image = Readers().image(picture, (0, 48), (0, 48))
        np.testing.assert_array_equal(image, wanted[picture.frame])
        tile = source.read(picture.frame, (slice(0, 48), slice(0, 48)))
        np.testing.assert_array_equal(tile, image)


@pytest.mark.parametrize(
    ("write", "said", "axes", "channels"),
    [(ome, "TCYX", "FYX", 1), (ome, "ZCYX", "FFYX", 1), (imagej, "TZCYX", "fyx", 1),
     (ome, "CYX", "FYX", 1), (rgb, "ZCYXS", "FYXC", 3), (rgb, "ZCYXS", "FFYXC", 3)],
)  # fmt: skip
def test_each_page_an_image_whatever_axes_pages_have(
    tmp_path: Path, write: Any, said: str, axes: str, channels: int
) -> None:
    sizes = {"C": 3, "T": 2, "Z": 5, "Y": H, "X": W, "S": 3}
    pixels = noise(*(sizes[letter] for letter in said)) % 250
    pages = np.moveaxis(pixels.reshape(-1, H, W, channels), -1, 1)
    folder = pair(tmp_path, write, pixels, said, len(pages))
    found = find_pictures(folder, axes)
    readers, path = Readers(), folder / "images/a.tif"
    named, asked = open_tiles(path, axes), open_tiles(path, None, channels)
    before = open_source(path, 2)
    assert len(found) == named.frames == asked.frames == before.frames == len(pages)
    assert digest(named) == digest(asked) == digest(before), "earlier results are gone on with"
    assert axes_taken(named) == axes_taken(asked) == ("FYX" if channels == 1 else "FYXC")
    assert (
        said_otherwise(asked, "for it")
        == f"the file says {said}, taken as {axes_taken(asked)} for it"
    )
    for picture, page in zip(found, pages, strict=True):
        np.testing.assert_array_equal(readers.image(picture, (0, H), (0, W)), page)
        tile = named.read(picture.frame, (slice(0, H), slice(0, W)))
        np.testing.assert_array_equal(tile, page)


@pytest.mark.parametrize(
    ("said", "channels", "wanted"),
    [("TCYX", 1, ["FYX"]), ("TCYX", 3, ["FCYX"]), ("TCYX", 2, []), ("ZYX", 5, ["CYX"]),
     ("TZYX", 2, ["CFYX"]), ("TZCYX", 3, ["FFCYX"])],
)  # fmt: skip
def test_only_axes_that_work_are_proposed(
    tmp_path: Path, said: str, channels: int, wanted: list[str]
) -> None:
    sizes = {"C": 3, "T": 2, "Z": 5, "Y": H, "X": W}
    imagej(tmp_path / "a.tif", noise(*(sizes[letter] for letter in said)), said)
    assert ways(open_tiles(tmp_path / "a.tif"), channels) == wanted
    for axes in wanted:
        assert open_tiles(tmp_path / "a.tif", axes).channels == channels


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


def png(path: Path, pixels: np.ndarray, axes: str) -> None:
    Image.fromarray(np.moveaxis(pixels, 0, -1).astype(np.uint8)).save(path, "PNG")


@pytest.mark.parametrize(
    ("write", "said", "n", "axes", "kind", "told"),
    [
        (plain, "", 1, None, InputError, r"3 x 40 x 56, its mask a\.tif 1 x .*say --axes CYX$"),
        (ome, "TYX", 1, None, InputError, r"say --axes CYX$"),
        (ome, "CYX", 3, None, InputError, r"pictures and no channels, say --axes FYX$"),
        (plain, "", 1, "YX", ConfigError, r"a\.tif: axes 'YX' do not fit .*\(3, 40, 56\)"),
        (plain, "", 2, "CYX", InputError, r"1 x 40 x 56 x 3, its mask a\.tif 2 x "),
        (png, "", 1, "CYX", ConfigError, r"axes 'CYX' are of TIFF files; leave them out for a\.tif"),
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
