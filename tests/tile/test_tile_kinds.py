"""Volumes and Zarr arrays, in and out: every pixel, and what is said where zarr is not installed."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from torch import nn

import raypipe
from raypipe.errors import InputError
from raypipe.tile.source import open_source, read_window


def numbers(*shape: int) -> np.ndarray:
    """All pixels differ, so that no two may change places."""
    return np.random.default_rng(2).permutation(int(np.prod(shape))).reshape(shape)


def doubling(dims: int, channels: int = 1) -> nn.Module:
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    model = conv(channels, channels, 1, bias=False, groups=channels).eval()
    nn.init.constant_(model.weight, 2.0)
    return model


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_of_a_tiff_volume(tmp_path: Path, channels: int) -> None:
    """A plane a page, cut out along all three axes, mirrored beyond the ends."""
    shape = (7, 30, 25) if channels == 1 else (7, 30, 25, channels)
    volume = numbers(*shape).astype(np.uint16)
    photometric = "minisblack" if channels == 1 else "rgb"
    tifffile.imwrite(tmp_path / "v.tif", volume, photometric=photometric, compression="zlib")
    source = pickle.loads(pickle.dumps(open_source(tmp_path / "v.tif", 3)))
    assert (source.frames, source.channels, source.space) == (1, channels, (7, 30, 25))
    first = np.moveaxis(volume, -1, 0) if channels > 1 else volume[None]
    box = (slice(2, 5), slice(11, 30), slice(0, 9))
    assert np.array_equal(source.read(0, box), first[(slice(None), *box)])
    beyond = (slice(5, 9), slice(20, 33), slice(21, 27))
    padded = np.pad(first, ((0, 0), (0, 2), (0, 3), (0, 2)), mode="reflect")
    assert np.array_equal(read_window(source, 0, beyond), padded[(slice(None), *beyond)])


@pytest.mark.parametrize("name", ["out.tif", "out.ome.tif", "out.npy", "out.zarr"])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_volume_is_tiled_in_three_dimensions_and_written(
    tmp_path: Path, name: str, channels: int
) -> None:
    volume = numbers(channels, 20, 40, 37).astype(np.float32)
    out = tmp_path / name
    got = raypipe.process_large_image(volume, doubling(3, channels), 16, out, axes="CZYX")
    wanted = volume.squeeze() * 2
    assert np.array_equal(np.asarray(got).reshape(wanted.shape), wanted)
    if out.suffix == ".tif":
        assert np.array_equal(tifffile.imread(out), wanted)
        axes = "CZYX"[channels == 1 :]
        with tifffile.TiffFile(out) as file:
            assert not file.is_ome or file.series[0].axes == axes


def test_pixels_of_a_zarr_input(tmp_path: Path) -> None:
    frames = numbers(3, 50, 45).astype(np.uint16)
    zarr.save_array(str(tmp_path / "in.zarr"), frames)
    source = open_source(tmp_path / "in.zarr", 2, "FYX")
    box = (slice(13, 31), slice(40, 45))
    assert np.array_equal(source.read(1, box), frames[1:2, 13:31, 40:45])
    got = raypipe.process_large_image(tmp_path / "in.zarr", doubling(2), 32, axes="FYX")
    assert np.array_equal(got, frames * np.float32(2))


def test_a_zarr_group_is_no_image(tmp_path: Path) -> None:
    zarr.open_group(str(tmp_path / "in.zarr"), mode="w")
    with pytest.raises(InputError, match="is a Zarr group; give the path of one of its arrays"):
        open_source(tmp_path / "in.zarr", 2)


def test_without_zarr_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.zarr").mkdir()
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(InputError, match=r"in.zarr needs the zarr package: pip install"):
        open_source(tmp_path / "in.zarr", 2)
    image = np.zeros((20, 20), np.float32)
    with pytest.raises(InputError, match=r"a .zarr output needs the zarr package: pip install"):
        raypipe.process_large_image(image, doubling(2), 16, tmp_path / "out.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["in.zarr"], "nothing is left behind"
