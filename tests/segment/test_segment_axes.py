"""--axes names what a file leaves open, wins over what it says of planes, and never over its channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from channel_files import H, W, colour, imagej, noise, ome, pair, plain, png, rgb

from raypipe.errors import ConfigError, InputError, RaypipeError
from raypipe.segment.channels import (
    axes_taken,
    check_axes,
    open_pixels,
    open_tiles,
    said_otherwise,
    ways,
)
from raypipe.segment.config import InputConfig
from raypipe.segment.pictures import Picture, find_pictures
from raypipe.segment.readers import Readers
from raypipe.tile.source import digest, open_source


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
