"""Streamed values against nibabel's, by every codec; files that are damaged; memory that is held."""

from __future__ import annotations

import gzip
import importlib
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nifti_kit import SHAPE, raw_values, unscaled, write_scan

from raypipe.errors import InputError
from raypipe.read.nifti import find_codec, open_scan, slab_grid, slabs
from raypipe.read.nifti.codec import NAMES

VOXELS = 5 * 6 * 7


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def streamed(scan, slab_bytes, codec=None):
    """(x, y, z, t) put together from slabs."""
    flat = np.zeros((scan.n_volumes, scan.volume_voxels), scan.dtype)
    for slab in slabs(scan, slab_bytes, codec):
        n, m = slab.values.shape
        flat[slab.t0 : slab.t0 + n, slab.p0 : slab.p0 + m] = slab.values
    return flat.T.reshape(scan.shape, order="F")


@given(st.integers(1, 50), st.integers(1, 20), st.sampled_from([1, 2, 4, 8]), st.integers(1, 2000))
def test_a_grid_takes_in_each_value_once_in_order(voxels, volumes, itemsize, slab_bytes):
    seen = []
    for t0, n, p0, m in slab_grid(voxels, volumes, itemsize, slab_bytes):
        assert n * m * itemsize <= max(slab_bytes, itemsize)
        assert n == 1 or m == voxels
        seen += [t * voxels + p for t in range(t0, t0 + n) for p in range(p0, p0 + m)]
    assert seen == list(range(voxels * volumes))


@pytest.mark.parametrize("codec", NAMES)
def test_every_codec_is_here_and_reads_the_same(tmp_path, codec):
    path = write_scan(tmp_path / "a.nii.gz", raw_values())
    found = find_codec([codec])
    assert found.name == codec
    np.testing.assert_array_equal(streamed(open_scan(path), 1000, found), unscaled(path))


def test_codecs_fall_back_in_order(monkeypatch):
    real, absent = importlib.import_module, []

    def import_module(name):
        if name.split(".")[0] in absent:
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    found = [find_codec().name]
    for package in ("isal", "zlib_ng"):
        absent.append(package)
        found.append(find_codec().name)
    assert found == ["isal", "zlib-ng", "zlib"]
    with pytest.raises(InputError, match="no gzip reader of isal"):
        find_codec(["isal"])


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.img", "a.img.gz"])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<f4", ">f8", "|u1"])
@pytest.mark.parametrize("slab_bytes", [64, 3 * VOXELS, 1 << 20])
def test_values_are_nibabels(tmp_path, name, dtype, slab_bytes):
    path = write_scan(tmp_path / name, raw_values(dtype=dtype), slope=2.0, inter=1.0)
    found = streamed(open_scan(path), slab_bytes)
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found, unscaled(path))


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 1)])
def test_one_volume(tmp_path, shape):
    path = write_scan(tmp_path / "a.nii.gz", raw_values(shape))
    np.testing.assert_array_equal(streamed(open_scan(path), 1 << 20), unscaled(path))


def test_blocks_of_whole_volumes(tmp_path):
    path = write_scan(tmp_path / "a.nii.gz", raw_values())
    wanted = unscaled(path).reshape(VOXELS, 9, order="F").T
    for block_bytes, sizes in [(2 * VOXELS * 4, [4, 4, 1]), (1, [1] * 9)]:
        found = [(t0, block.copy()) for t0, block in open_scan(path).volumes(block_bytes)]
        assert [len(block) for _, block in found] == sizes
        assert [t0 for t0, _ in found] == np.cumsum([0, *sizes[:-1]]).tolist()
        np.testing.assert_array_equal(np.concatenate([block for _, block in found]), wanted)


def test_a_stream_of_several_members_and_bytes_after_the_values(tmp_path):
    """As bgzip writes it."""
    path = write_scan(tmp_path / "a.nii.gz", raw_values(), tail=b"more" * 100)
    whole = gzip.decompress(path.read_bytes())
    parts = [whole[at : at + 1000] for at in range(0, len(whole), 1000)]
    path.write_bytes(b"".join(map(gzip.compress, parts)))
    np.testing.assert_array_equal(streamed(open_scan(path), 500), raw_values())


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("kept", [0.3, 0.9, -9, -4, -1])
def test_a_truncated_gz_is_one_error(tmp_path, codec, kept):
    path = write_scan(tmp_path / "a.nii.gz", raw_values((20, 20, 10, 9)))
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if kept > 0 else kept])
    wanted = 352 + 20 * 20 * 10 * 9 * 2
    with pytest.raises(InputError) as caught:
        streamed(open_scan(path), 9000, find_codec([codec]))
    text = str(caught.value)
    assert text.startswith(f"scan {path} gave ")
    assert f" of {wanted} unpacked bytes" in text
    assert text.endswith("copy it again")
    assert "\n" not in text


@pytest.mark.parametrize("codec", NAMES)
@pytest.mark.parametrize("at", [0.5, -6, -2])
def test_a_flipped_byte_is_one_error(tmp_path, codec, at):
    """In the middle, in the CRC, in the length: the last two are known only when all is read."""
    path = write_scan(tmp_path / "a.nii.gz", raw_values((20, 20, 10, 9)))
    data = bytearray(path.read_bytes())
    data[int(at * len(data)) if at > 0 else at] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(InputError, match="is damaged or not whole"):
        streamed(open_scan(path), 9000, find_codec([codec]))


@pytest.mark.parametrize("name", ["a.nii", "a.img"])
def test_a_truncated_plain_scan(tmp_path, name):
    path = write_scan(tmp_path / name, raw_values())
    os.truncate(path, path.stat().st_size - 1)
    scan = open_scan(path)
    with pytest.raises(InputError, match=f"gave {scan.data_offset + VOXELS * 18 - 1} of"):
        streamed(scan, 1000)


def test_a_scan_that_changes_while_it_is_read(tmp_path):
    path = write_scan(tmp_path / "a.nii", raw_values())
    scan = open_scan(path)
    write_scan(path, raw_values((5, 6, 7, 10)))
    with pytest.raises(InputError, match="was changed while in use"):
        next(slabs(scan))
    scan = open_scan(path)
    stream = slabs(scan, 1000)
    next(stream)
    os.utime(path, ns=(0, 0))
    with pytest.raises(InputError, match="was changed while in use"):
        list(stream)


def test_a_pass_that_is_left_early_closes_its_file(tmp_path):
    scan = open_scan(write_scan(tmp_path / "a.nii.gz", raw_values()))
    before = open_files()
    stream = slabs(scan, 1000)
    next(stream)
    assert open_files() > before
    stream.close()
    assert open_files() == before


def test_two_slabs_are_all_that_is_held(tmp_path):
    scan = open_scan(write_scan(tmp_path / "a.nii.gz", np.zeros((64, 64, 32, 40), "<i2"), level=1))
    list(slabs(scan, 1 << 20))  # what is imported on the way is not what is measured
    tracemalloc.start()
    for _ in slabs(scan, 1 << 20):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 2 << 20 <= peak < 7 << 19  # of 10 MiB


def test_the_kit_writes_what_it_says(tmp_path):
    for dtype in ("<i2", ">i2"):
        path = write_scan(tmp_path / "a.nii.gz", raw_values(SHAPE, dtype))
        np.testing.assert_array_equal(unscaled(path), raw_values(SHAPE, dtype))
