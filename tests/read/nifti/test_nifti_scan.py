"""Headers of all kinds of NIfTI files, against what nibabel reads; and what is refused."""

from __future__ import annotations

import pickle

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nifti_kit import AFFINE, SHAPE, put, raw_values, write_scan

from raypipe.errors import InputError, MissingInput
from raypipe.read.nifti import file_positions, open_scan
from raypipe.read.sample import BLOCK_BYTES, content_sample


def test_what_a_header_says(tmp_path):
    path = write_scan(
        tmp_path / "a.nii.gz", raw_values(), slope=0.5, inter=-3.0, tr=1500.0, units="msec"
    )
    scan = open_scan(path)
    assert (scan.shape, scan.dtype, scan.kind) == (SHAPE, np.dtype("<i2"), "nii.gz")
    assert (scan.slope, scan.inter, scan.data_offset) == (0.5, -3.0, 352)
    assert scan.tr_s == pytest.approx(1.5)
    assert scan.zooms_mm == (2.0, 2.0, 2.5)
    np.testing.assert_array_equal(scan.affine, AFFINE)
    assert (scan.size_bytes, scan.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)
    assert scan.describe() == "a.nii.gz 5x6x7x9 int16 * 0.5 + -3"


def test_a_scan_is_a_handle(tmp_path):
    scan = open_scan(write_scan(tmp_path / "a.nii", raw_values()))
    sent = pickle.dumps(scan)
    assert len(sent) < 2000
    there = pickle.loads(sent)
    assert (there.path, there.shape, there.header_hash) == (scan.path, scan.shape, scan.header_hash)


@pytest.mark.parametrize("slope", [np.nan, 0.0, np.inf])
def test_a_slope_that_is_none(tmp_path, slope):
    scan = open_scan(write_scan(tmp_path / "a.nii", raw_values(), slope=slope, inter=5.0))
    assert (scan.slope, scan.inter, scan.scaled) == (1.0, 0.0, False)


def test_big_endian(tmp_path):
    scan = open_scan(write_scan(tmp_path / "a.nii.gz", raw_values(dtype=">i2")))
    assert scan.dtype == np.dtype(">i2")
    assert scan.native == np.dtype("=i2")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("given_name", ["hdr", "img"])
def test_a_pair_by_either_name(tmp_path, suffix, given_name):
    write_scan(tmp_path / f"a.img{suffix}", raw_values())
    scan = open_scan(tmp_path / f"a.{given_name}{suffix}")
    assert (scan.kind, scan.path.name, scan.data_offset) == ("pair", f"a.img{suffix}", 0)
    assert scan.compressed == bool(suffix)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [((5, 6, 7), (5, 6, 7, 1)), ((5, 6, 7, 1), (5, 6, 7, 1)), ((5, 6, 7, 2, 1), (5, 6, 7, 2))],
)
def test_shapes_that_mean_a_series(tmp_path, shape, wanted):
    assert open_scan(write_scan(tmp_path / "a.nii", raw_values(shape))).shape == wanted


def test_a_three_dimensional_scan_has_no_tr(tmp_path):
    assert open_scan(write_scan(tmp_path / "a.nii", raw_values((5, 6, 7)))).tr_s is None


@pytest.mark.parametrize(
    ("tr", "units", "tr_s"), [(0.0, "sec", None), (2.0, "hz", None), (2.0, "unknown", 2.0)]
)
def test_a_repetition_time_that_is_not_told(tmp_path, tr, units, tr_s):
    assert open_scan(write_scan(tmp_path / "a.nii", raw_values(), tr=tr, units=units)).tr_s == tr_s


def test_what_is_refused(tmp_path):
    with pytest.raises(MissingInput, match=r"none\.nii is not there"):
        open_scan(tmp_path / "none.nii")
    (tmp_path / "empty.nii").write_bytes(b"")
    (tmp_path / "text.nii.gz").write_bytes(b"not gzip")
    put(tmp_path / "other.nii.gz", b"x" * 1000)
    for name in ("empty.nii", "text.nii.gz", "other.nii.gz"):
        with pytest.raises(InputError, match=f"{name} has no readable NIfTI header"):
            open_scan(tmp_path / name)
    with pytest.raises(InputError, match=r"shape \(2, 3, 4, 5, 2\)"):
        open_scan(write_scan(tmp_path / "five.nii", raw_values((2, 3, 4, 5, 2))))
    with pytest.raises(InputError, match="complex64 values"):
        open_scan(write_scan(tmp_path / "phase.nii", np.ones(SHAPE, "<c8")))
    nib.save(nib.MGHImage(raw_values(dtype="<f4"), AFFINE), tmp_path / "a.mgz")
    with pytest.raises(InputError, match="MGHImage, not NIfTI"):
        open_scan(tmp_path / "a.mgz")


def test_a_header_that_is_cut_short(tmp_path):
    path = write_scan(tmp_path / "a.nii.gz", raw_values())
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match="no readable NIfTI header"):
        open_scan(path)


def test_another_header_has_another_hash(tmp_path):
    first = open_scan(write_scan(tmp_path / "a.nii", raw_values(), slope=2.0, inter=0.0))
    again = open_scan(write_scan(tmp_path / "b.nii", raw_values(), slope=2.0, inter=0.0))
    other = open_scan(write_scan(tmp_path / "c.nii", raw_values(), slope=3.0, inter=0.0))
    assert first.header_hash == again.header_hash != other.header_hash


@given(st.tuples(*[st.integers(1, 9)] * 3), st.data())
def test_places_on_the_disk_are_numpys(shape, data):
    size = int(np.prod(shape))
    flat = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=20)), dtype=np.int64)
    wanted = np.ravel_multi_index(np.unravel_index(flat, shape), shape, order="F")
    np.testing.assert_array_equal(file_positions(flat, shape), wanted)


def test_a_sample_sees_one_value_in_the_middle_of_a_compressed_scan(tmp_path):
    """16 blocks of a 4 MB file: the change is in none but the last, which holds the CRC-32."""
    raw = raw_values((64, 64, 32, 16), dtype="<i2")
    before = write_scan(tmp_path / "a.nii.gz", raw, level=0)
    raw[11, 12, 13, 7] ^= 1
    after = write_scan(tmp_path / "b.nii.gz", raw, level=0)
    size = before.stat().st_size
    assert size == after.stat().st_size
    assert size > 2 * 16 * BLOCK_BYTES
    assert content_sample(before, size) != content_sample(after, size)
