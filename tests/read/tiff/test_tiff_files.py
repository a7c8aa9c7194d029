"""Many files behind one index: folders, lists, OME-TIFF in several files; real stacks."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from tiff_kit import values

from raypipe.errors import InputError, MissingInput
from raypipe.read.tiff import load_tiff_stack, open_tiff
from raypipe.read.tiff.opened import MOST_OPEN, _open


def test_a_folder_in_the_order_of_its_numbers(tmp_path):
    expected = values((12, 9, 11))
    for k, frame in enumerate(expected):
        tifffile.imwrite(tmp_path / f"frame_{k + 1}.TIF", frame)
    (tmp_path / "._frame_1.tif").write_bytes(b"macOS")
    (tmp_path / "notes.txt").write_text("no picture")
    stack = load_tiff_stack(tmp_path)
    assert stack.shape == (12, 9, 11)
    np.testing.assert_array_equal(np.asarray(stack), expected)


@settings(max_examples=8)
@given(counts=st.lists(st.integers(1, 4), min_size=2, max_size=4), data=st.data())
def test_files_of_many_kinds_behind_one_index(tmp_path_factory, counts, data):
    folder, frames, paths = tmp_path_factory.mktemp("files"), [], []
    for k, n in enumerate(counts):
        frames.append(values((n, 13, 17), seed=k))
        options = [{}, {"compression": "lzw"}, {"byteorder": ">"}, {"tile": (16, 16)}][k]
        paths.append(folder / f"{9 - k}.tif")
        tifffile.imwrite(paths[-1], frames[-1], photometric="minisblack", **options)
    stack, expected = open_tiff(paths), np.concatenate(frames)
    assert stack.shape == expected.shape
    for frame in data.draw(st.permutations(range(len(expected)))):
        np.testing.assert_array_equal(stack.read(frame, slice(2, 9)), expected[frame, 2:9])


def test_more_files_than_are_held_open(tmp_path):
    for k in range(MOST_OPEN + 5):
        tifffile.imwrite(tmp_path / f"{k}.tif", np.full((3, 4), k, np.uint16))
    stack = load_tiff_stack(tmp_path)
    for _ in range(2):
        np.testing.assert_array_equal(stack[:, 1, 2], np.arange(MOST_OPEN + 5))
    assert len(_open) <= MOST_OPEN


def test_files_that_do_not_fit_together(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", values((9, 11)))
    tifffile.imwrite(tmp_path / "b.tif", values((9, 12)))
    with pytest.raises(InputError, match=r"b\.tif has pages of 9x12x1 uint16, a\.tif of 9x11x1"):
        open_tiff(tmp_path)
    tifffile.imwrite(tmp_path / "b.tif", values((9, 11), "f4"))
    with pytest.raises(InputError, match="float32"):
        open_tiff(tmp_path)


@pytest.fixture(params=[None, "deflate"])
def ome_set(tmp_path, request):
    """Two OME-TIFF files of one set, (2 times, 3 channels), each channel's planes in turn."""
    expected = values((2, 3, 20, 24))
    names = ["one.ome.tif", "two.ome.tif"]
    uuids = [f"urn:uuid:{k}bc0e5c2-7d30-4c58-9a1c-000000000000" for k in range(2)]
    planes = [[], []]
    data, where = "", {}
    for t in range(2):
        for c in range(3):
            which = (t + c) % 2
            where[t, c] = which, len(planes[which])
            data += (
                f'<TiffData FirstT="{t}" FirstC="{c}" IFD="{len(planes[which])}" PlaneCount="1">'
                f'<UUID FileName="{names[which]}">{uuids[which]}</UUID></TiffData>'
            )
            planes[which].append(expected[t, c])
    for name, uuid, pages in zip(names, uuids, planes, strict=True):
        xml = (
            '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas'
            f'/OME/2016-06" UUID="{uuid}"><Image ID="Image:0"><Pixels ID="Pixels:0" SizeX="24" '
            'SizeY="20" SizeZ="1" SizeC="3" SizeT="2" DimensionOrder="XYCZT" Type="uint16">'
            f"{data}</Pixels></Image></OME>"
        )
        with tifffile.TiffWriter(tmp_path / name) as tif:
            for k, page in enumerate(pages):
                tif.write(
                    page,
                    contiguous=False,
                    metadata=None,
                    description=xml if k == 0 else None,
                    compression=request.param,
                )
    return tmp_path, expected


def test_an_ome_set_is_found_from_one_of_its_files(ome_set):
    folder, expected = ome_set
    np.testing.assert_array_equal(tifffile.imread(folder / "one.ome.tif"), expected)
    for name in ("one.ome.tif", "two.ome.tif"):
        stack = load_tiff_stack(folder / name)
        assert (stack.shape, stack.axes) == ((2, 3, 20, 24), "TCYX")
        np.testing.assert_array_equal(np.asarray(stack), expected)
        assert len(stack.source.parts) == 2


def test_an_ome_set_given_as_a_list_is_not_read_twice(ome_set):
    folder, expected = ome_set
    stack = load_tiff_stack([folder / "one.ome.tif", folder / "two.ome.tif"])
    own = [(0, 0), (0, 2), (1, 1), (0, 1), (1, 0), (1, 2)]  # of one.ome.tif, then of two.ome.tif
    np.testing.assert_array_equal(np.asarray(stack), [expected[at] for at in own])


def test_a_file_that_an_ome_set_lacks(ome_set):
    folder, expected = ome_set
    (folder / "two.ome.tif").unlink()
    stack = load_tiff_stack(folder / "one.ome.tif")
    assert "Missing data are zeroed" in stack.source.why[0]  # tifffile's words for what it would do
    np.testing.assert_array_equal(stack[1, 1], expected[1, 1])
    with pytest.raises(InputError, match=r"frame 1 of .* is not there"):
        stack[0, 1]


def test_no_files(tmp_path):
    with pytest.raises(MissingInput, match=r"holds no \.tif or \.tiff"):
        open_tiff(tmp_path)
    with pytest.raises(MissingInput, match="empty list"):
        open_tiff([])
    with pytest.raises(MissingInput, match="is not there"):
        open_tiff(tmp_path / "a.tif")


def test_real_single_molecule_frames(real_data):
    folder = real_data / "storm"
    if not folder.is_dir():
        pytest.skip(f"real frames are not at {folder}; set RAYPIPE_REAL_DATA")
    stack = load_tiff_stack(folder)
    paths = [folder / f"{k}.tif" for k in range(1, 13)]
    expected = tifffile.imread(paths)
    assert (stack.shape, stack.dtype) == ((12, 332, 492), np.uint16)
    np.testing.assert_array_equal(np.asarray(stack), expected)
    np.testing.assert_array_equal(stack[::-5, 100:130, -40:], expected[::-5, 100:130, -40:])


def test_real_stack_and_image(real_data, tmp_path):
    nuclei = real_data / "nuclei"
    if not nuclei.is_dir():
        pytest.skip(f"real images are not at {nuclei}; set RAYPIPE_REAL_DATA")
    for name, way in (("img2d", "map"), ("mask2d", "map"), ("img3d", "pages"), ("mask3d", "pages")):
        path = nuclei / f"{name}.tif"
        stack, expected = load_tiff_stack(path), tifffile.imread(path)
        np.testing.assert_array_equal(np.asarray(stack), expected)
        assert (stack.shape, stack.source.way) == (expected.shape, (way,))
    shutil.copy(nuclei / "img3d.tif", tmp_path / "again.tif")
    both = load_tiff_stack([nuclei / "img3d.tif", tmp_path / "again.tif"])
    np.testing.assert_array_equal(both[31], both[0])
