"""Every kind of TIFF file, read by parts, against what tifffile.imread makes of the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import basic_indices
from tiff_kit import KINDS, big_imagej, values

import raypipe
from raypipe.errors import ConfigError
from raypipe.read.tiff import load_tiff_stack, open_tiff


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, tuple[Path, np.ndarray]]:
    """Each kind's file, and what tifffile reads from it."""
    made = {}
    for name, kind in KINDS.items():
        path = kind.write(tmp_path_factory.mktemp("kind"), values(kind.shape, kind.dtype))
        made[name] = path, tifffile.imread(path)
    return made


@pytest.mark.parametrize("name", KINDS)
def test_the_whole(whole, name):
    path, expected = whole[name]
    stack = load_tiff_stack(path)
    assert (stack.shape, stack.dtype, stack.ndim) == (expected.shape, expected.dtype, expected.ndim)
    assert (len(stack), stack.size, stack.nbytes) == (len(expected), expected.size, expected.nbytes)
    assert len(stack.axes) == stack.ndim
    np.testing.assert_array_equal(np.asarray(stack), expected)
    np.testing.assert_array_equal(list(stack)[-1], expected[-1])
    assert stack.source.way == (KINDS[name].way,)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=10)
@given(data=st.data())
def test_any_slice(whole, name, data):
    path, expected = whole[name]
    stack = load_tiff_stack(path)
    index = data.draw(basic_indices(expected.shape))
    got = stack[index]
    np.testing.assert_array_equal(got, expected[index])
    assert np.shape(got) == np.shape(expected[index])


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=6)
@given(data=st.data())
def test_any_crop_of_any_frame(whole, name, data):
    path, expected = whole[name]
    stack = open_tiff(path)
    frames = expected.reshape(stack.shape)
    frame = data.draw(st.integers(0, len(stack) - 1))
    rows, cols = (data.draw(spans(size)) for size in stack.shape[1:3])
    crop = stack.read(frame, rows, cols)
    np.testing.assert_array_equal(crop, frames[frame, rows, cols])
    assert crop.dtype.isnative
    assert crop.flags.c_contiguous
    crop[...] = 0  # the caller's own: what is read next is not what was written to it
    np.testing.assert_array_equal(stack.read(frame, rows, cols), frames[frame, rows, cols])


@st.composite
def spans(draw, size):
    lo = draw(st.integers(0, size))
    return slice(lo, draw(st.integers(lo, size)))


@settings(max_examples=6)
@given(st.integers(0, 5), st.integers(0, 5))
def test_frames(whole, a, b):
    path, expected = whole["deflate"]
    lo, hi = sorted((a, b))
    np.testing.assert_array_equal(open_tiff(path).frames(lo, hi), expected[lo:hi])


def test_a_thumbnail_in_bands(tmp_path, monkeypatch):
    monkeypatch.setattr("raypipe.read.tiff.lazy._BAND_BYTES", 2000)
    expected = values((2, 301, 47, 3))
    tifffile.imwrite(tmp_path / "a.tif", expected, compression="deflate", rowsperstrip=16)
    stack = load_tiff_stack(tmp_path / "a.tif")
    for rows in (slice(None, None, 7), slice(None, None, -3), slice(290, 3, -11)):
        np.testing.assert_array_equal(stack[1, rows, ::-5, ::2], expected[1, rows, ::-5, ::2])


def test_imagej_above_4_gb(tmp_path):
    frame = values((1024, 2048))
    n, last = 1200, values((1024, 2048), seed=1)  # 5.0 GB, one directory
    path = big_imagej(tmp_path / "big.tif", n, 1024, 2048, {0: frame, 1199: last, 1150: frame})
    if path.stat().st_blocks * 512 > 1 << 30:
        pytest.skip("this file system keeps no holes")
    stack = raypipe.load_tiff_stack(path)
    assert (stack.shape, stack.axes) == ((2, 600, 1024, 2048), "TZYX")
    assert stack.nbytes > 1 << 32
    np.testing.assert_array_equal(stack[0, 0], frame)
    np.testing.assert_array_equal(stack[-1, -1, 5:9], last[5:9])
    np.testing.assert_array_equal(stack[1, 550, :, 7], frame[:, 7])
    assert not stack[1, 598, ::64, ::64].any()


def test_what_is_not_there(whole):
    stack = open_tiff(whole["deflate"][0])
    for frame, rows in (
        (5, slice(None)),
        (-1, slice(None)),
        (0, slice(0, 38)),
        (0, slice(0, 9, 2)),
    ):
        with pytest.raises(ConfigError):
            stack.read(frame, rows)
    with pytest.raises(ConfigError, match="frames 3 to 6"):
        stack.frames(3, 6)
    with pytest.raises(ConfigError, match="C-contiguous"):
        stack.read_into(0, np.empty((53, 37), np.uint16).T)
    lazy = load_tiff_stack(whole["deflate"][0])
    for index in (5, -6, (0, 0, 0, 0), [1, 2], True, np.array([1]), None, (..., ...), 1.0):
        with pytest.raises(IndexError):
            lazy[index]
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(lazy, copy=False)
    assert np.asarray(lazy, dtype="f4").dtype == np.float32


def test_pages_of_other_kinds_are_left_out_aloud(tmp_path):
    expected = values((12, 20, 30))
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        for k, page in enumerate(expected):
            tif.write(page, contiguous=False, metadata=None)
            if k == 5:
                tif.write(page[:7], contiguous=False, metadata=None)
    stack = load_tiff_stack(tmp_path / "a.tif")
    np.testing.assert_array_equal(np.asarray(stack), expected)
    assert "1 pages of another kind are left out" in stack.source.why[0]
