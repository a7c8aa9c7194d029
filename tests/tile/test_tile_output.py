"""What is written, as independent readers see it, and from where it is read."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import raypipe
from raypipe.errors import ConfigError, InputError, MissingInput, UnknownName
from raypipe.tile.bigtiff import BigTiff
from raypipe.tile.grid import TileGrid
from raypipe.tile.output import OutputSpec, create, open_output
from raypipe.tile.source import ArraySource, open_source, read_window

SHAPES = st.sampled_from([(1, 1, 40, 50), (3, 1, 33, 70), (1, 2, 100, 20), (2, 3, 64, 64)])


@pytest.mark.parametrize("name", ["out.npy", "out.tif", "out.ome.tif", "out.zarr"])
@settings(max_examples=12)
@given(shape=SHAPES, dtype=st.sampled_from(["uint8", "uint16", "float32"]), seed=st.integers(0, 99))
def test_tiles_written_in_any_order_are_what_a_reader_reads(
    tmp_path_factory: pytest.TempPathFactory, name: str, shape, dtype: str, seed: int
) -> None:
    path = tmp_path_factory.mktemp("out") / name
    rng = np.random.default_rng(seed)
    wanted = rng.integers(0, 255, shape).astype(dtype)
    grid = TileGrid.of(shape[2:], (32, 32), (0, 0), (1, 1))
    spec = OutputSpec(
        path=path, grid=grid, frames=shape[0], channels=shape[1], dtype=dtype,
        keep_frames=shape[0] > 1, keep_channels=shape[1] > 1,
    )  # fmt: skip
    create(spec, path)
    output = open_output(spec, path)
    for number in rng.permutation(shape[0] * len(grid)):
        frame, tile = divmod(int(number), len(grid))
        box = grid.tile(tile).keep
        output.write(frame, box, wanted[(frame, slice(None), *box)])
        assert np.array_equal(output.read(frame, box), wanted[(frame, slice(None), *box)])
    output.sync()
    output.close()
    assert np.array_equal(read_by_others(path), wanted.squeeze())


def read_by_others(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".zarr":
        import zarr

        return zarr.open_array(str(path), mode="r")[:]
    return tifffile.imread(path)


def test_ome_says_which_axis_is_which(tmp_path: Path) -> None:
    spec = OutputSpec(
        path=tmp_path / "a.ome.tif", grid=TileGrid.of((4, 40, 50), (2, 16, 16), (0,) * 3, (1,) * 3),
        frames=3, channels=2, dtype="float32", keep_frames=True, keep_channels=True,
    )  # fmt: skip
    create(spec, spec.path)
    with tifffile.TiffFile(spec.path) as file:
        assert file.is_bigtiff and file.is_ome and file.pages[0].is_tiled
        assert file.series[0].axes == "TCZYX" and file.series[0].shape == (3, 2, 4, 40, 50)
    assert spec.path.stat().st_size == spec.nbytes


def test_what_tiff_cannot_hold_is_said(tmp_path: Path) -> None:
    args = {"shape": (1, 1, 1, 9, 9), "described": (9, 9)}
    with pytest.raises(ConfigError, match="multiple of 16"):
        BigTiff(dtype=np.dtype("uint8"), tile=40, **args)
    with pytest.raises(ConfigError, match="OME-TIFF has no dtype float16"):
        BigTiff(dtype=np.dtype("float16"), tile=16, ome=True, **args)


def test_an_unknown_kind_of_output_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"name it .npy"):
        raypipe.process_large_image(np.zeros((9, 9), "f4"), nn.Conv2d(1, 1, 1), 8, "out.png")


def test_an_unknown_option_is_named_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="unknown option 'overlaps'; nearest: overlap"):
        raypipe.process_large_image(np.zeros((9, 9), "f4"), nn.Conv2d(1, 1, 1), 8, overlaps=3)


def test_a_folder_is_no_image_but_a_stack_of_its_files_is(tmp_path: Path) -> None:
    for k in range(6):
        tifffile.imwrite(tmp_path / f"{k}.tif", np.full((40, 33), k, np.uint8))
    with pytest.raises(InputError, match=r"is a folder; give one of its files.*load_tiff_stack"):
        open_source(tmp_path, 2)
    source = open_source(raypipe.load_tiff_stack(tmp_path), 2)
    assert source.frames == 6 and source.space == (40, 33)


def test_a_map_travels_as_its_path(tmp_path: Path) -> None:
    whole = np.arange(200_000, dtype=np.float32).reshape(400, 500)
    np.save(tmp_path / "a.npy", whole)
    source = open_source(tmp_path / "a.npy", 2)
    raw = pickle.dumps(source)
    assert len(raw) < 1000
    box = (slice(10, 20), slice(30, 33))
    assert np.array_equal(pickle.loads(raw).read(0, box), whole[None, 10:20, 30:33])
    view = ArraySource(np.load(tmp_path / "a.npy", mmap_mode="r")[5:], "YX")
    assert np.array_equal(pickle.loads(pickle.dumps(view)).read(0, box), whole[None, 15:25, 30:33])


@pytest.mark.parametrize("axes", ["YX", "YXC", "CYX", "FYX", "FYXC", "CFXY", "ZYX", "FZYX", "CZYX"])
def test_named_axes(axes: str) -> None:
    sizes = {"F": 2, "C": 3, "Z": 4, "Y": 11, "X": 13}
    array = np.random.default_rng(0).integers(0, 9, [sizes[a] for a in axes])
    source = ArraySource(array, axes)
    space = [a for a in "ZYX" if a in axes]
    assert source.space == tuple(sizes[a] for a in space)
    box = tuple(slice(sizes[a] - 3, sizes[a] + 2) for a in space)
    wanted = np.einsum(f"{axes}->" + "".join(a for a in "FC" if a in axes) + "".join(space), array)
    wanted = wanted.reshape(source.frames, source.channels, *source.space)
    wanted = np.pad(wanted, [(0, 0), (0, 0), *((0, 2) for _ in space)], mode="reflect")
    for frame in range(source.frames):
        assert np.array_equal(read_window(source, frame, box), wanted[(frame, slice(None), *box)])


def test_an_array_that_can_be_read_in_several_ways_is_refused() -> None:
    with pytest.raises(ConfigError, match="name its axes"):
        open_source(np.zeros((100, 100, 3)), 2)
    with pytest.raises(MissingInput, match=r"gone.npy does not exist"):
        open_source("gone.npy", 2)


def test_a_hyperstack_is_read_by_its_named_axes(tmp_path: Path) -> None:
    frames = np.random.default_rng(1).integers(0, 99, (2, 5, 3, 40, 33), np.uint8)  # T Z C Y X
    path = tmp_path / "in.tif"
    tifffile.imwrite(path, frames, imagej=True)
    with pytest.raises(ConfigError, match=r"a TIFF of axes TZCYX .* is not one volume; name them"):
        open_source(path, 3)
    source = pickle.loads(pickle.dumps(open_source(path, 3, "FZCYX")))
    assert (source.frames, source.channels, source.space) == (2, 3, (5, 40, 33))
    box = (slice(1, 4), slice(7, 20), slice(3, 9))
    assert np.array_equal(source.read(1, box), frames[1, 1:4, :, 7:20, 3:9].swapaxes(0, 1))
    with pytest.raises(ConfigError, match="do not fit an array of shape"):
        open_source(path, 2, "FCYX")


def test_one_volume_and_channel_pages_of_a_tiff(tmp_path: Path) -> None:
    planes = np.random.default_rng(1).integers(0, 99, (3, 40, 33), np.uint8)
    path = tmp_path / "in.tif"
    tifffile.imwrite(path, planes, photometric="minisblack")
    assert open_source(path, 3).space == (3, 40, 33)
    source = open_source(path, 2, "CYX")
    assert source.frames == 1 and source.channels == 3
    assert np.array_equal(source.read(0, (slice(0, 40), slice(0, 33))), planes)


def test_axes_of_a_picture_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "in.png")
    with pytest.raises(ConfigError, match="axes 'YX' are of arrays and TIFF"):
        open_source(tmp_path / "in.png", 2, "YX")


def test_a_tiff_is_read_and_written(tmp_path: Path) -> None:
    pages = np.random.default_rng(1).integers(0, 99, (3, 45, 70), np.uint8)
    tifffile.imwrite(tmp_path / "in.tif", pages, compression="zlib", photometric="minisblack")
    model = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    got = raypipe.process_large_image(tmp_path / "in.tif", model, 32, tmp_path / "out.tif")
    assert np.array_equal(np.asarray(got), pages * np.float32(2))
    assert np.array_equal(tifffile.imread(tmp_path / "out.tif"), pages * np.float32(2))
