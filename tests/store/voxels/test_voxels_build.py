"""What is in an entry, for all kinds of scans, against nibabel and nilearn."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.testing import data_path
from nifti_kit import raw_values, unscaled, write_scan
from nilearn.maskers import NiftiMasker
from nilearn.masking import apply_mask
from voxel_kit import a_mask, a_scan, entries, litter, quiet, start

from raypipe.errors import ConfigError, InputError, MissingInput, StoreCorrupt
from raypipe.read.nifti import find_codec, open_scan
from raypipe.store.voxels import (
    VoxelStore,
    build,
    build_and_gather,
    find,
    gather_once,
    making,
    read_in_place,
)


def raw_of(scan, flat):
    """(n, t) by nibabel and plain indexing."""
    return unscaled(scan.path)[np.unravel_index(flat, scan.shape[:3])]


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.img", "a.img.gz"])
@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<f4", ">f4", "|u1"])
@pytest.mark.parametrize("block_bytes", [256, 24 << 20])
def test_an_entry_holds_the_masked_voxels_side_by_side(tmp_path, name, dtype, block_bytes):
    scan, mask = a_scan(tmp_path, name, dtype=dtype), a_mask()
    flat = np.flatnonzero(mask)
    rois = {"some": flat[3:40:5], "unordered": flat[[9, 2, 2, 30]]}
    wanted = raw_of(scan, flat)
    pending = build_and_gather(
        scan, flat, rois, tmp_path / "cache", block_bytes=block_bytes, say=quiet
    )
    with pending.store() as store:
        assert store.dtype == np.dtype(dtype).newbyteorder("<")
        np.testing.assert_array_equal(np.load(store.paths.folder / "data.npy"), wanted)
        np.testing.assert_array_equal(store.voxels, flat)
        for roi, voxels in rois.items():
            np.testing.assert_array_equal(store.read(voxels), raw_of(scan, voxels))
            np.testing.assert_array_equal(pending.series[roi], raw_of(scan, voxels))
            assert pending.series[roi].dtype.isnative
        store.verify()
    assert litter(tmp_path / "cache") == []


def test_rows_are_in_nilearns_order(tmp_path):
    scan, mask = a_scan(tmp_path), a_mask()
    image = nib.Nifti1Image(mask.astype("u1"), scan.affine)
    with build(scan, np.flatnonzero(mask), tmp_path / "cache", say=quiet) as store:
        theirs = apply_mask(nib.load(scan.path), image, dtype="f8")
        np.testing.assert_allclose(store.scaled(store.voxels, "f8"), theirs.T, rtol=1e-12)


@pytest.mark.parametrize("inter", [812.5, -30000 * 0.0371])
def test_scaled_int16_is_neither_cut_nor_blown_up(tmp_path, inter):
    scan = a_scan(tmp_path, inter=inter)
    exact = nib.load(scan.path).get_fdata()
    with build(scan, None, tmp_path / "cache", say=quiet) as store:
        found = store.scaled(np.arange(scan.volume_voxels)).reshape(scan.shape)
        assert (store.dtype, found.dtype) == (np.dtype("<i2"), np.float32)
        assert store.nbytes == scan.data_bytes
    np.testing.assert_allclose(found, exact, rtol=1e-6, atol=0)


def test_nibabels_functional_scan(tmp_path):
    """A real slope and intercept; get_fdata and nilearn's masker, to 1e-6 relative."""
    path = Path(data_path) / "functional.nii"
    scan, image = open_scan(path), nib.load(path)
    assert scan.scaled
    exact = image.get_fdata()
    mask = exact.mean(-1) > np.median(exact.mean(-1))
    flat = np.flatnonzero(mask)
    with build(scan, flat, tmp_path / "cache", say=quiet) as store:
        found = store.scaled(flat)
    np.testing.assert_allclose(found, exact[mask], rtol=1e-6, atol=0)
    masker = NiftiMasker(
        nib.Nifti1Image(mask.astype("u1"), image.affine), dtype="f8", standardize=None
    )
    theirs = masker.fit_transform(path)
    np.testing.assert_allclose(found, theirs.T, rtol=1e-6, atol=0)


def test_a_real_scan(tmp_path, real_data):
    """Haxby et al. 2001: 40x20x1x1452 int16, one subject's half slice."""
    folder = real_data / "haxby"
    scan = open_scan(folder / "bold.nii.gz")
    mask = np.asarray(nib.load(folder / "mask.nii.gz").dataobj).reshape(scan.shape[:3]) > 0
    exact = nib.load(scan.path).get_fdata()
    with build(scan, np.flatnonzero(mask), tmp_path / "cache", say=quiet) as store:
        assert store.tr_s == 2.5
        np.testing.assert_allclose(store.scaled(store.voxels), exact[mask], rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 1)])
def test_one_volume(tmp_path, shape):
    scan = a_scan(tmp_path, shape=shape)
    flat = np.flatnonzero(a_mask())
    with build(scan, flat, tmp_path / "cache", say=quiet) as store:
        np.testing.assert_array_equal(store.read(flat), raw_of(scan, flat))
        assert store.read(flat).shape == (flat.size, 1)


def test_limits_check_themselves(tmp_path):
    for limits in ({"quota_bytes": 0}, {"block_bytes": 0}):
        with pytest.raises(ConfigError, match="is not above 0"):
            build(a_scan(tmp_path), None, tmp_path / "cache", say=quiet, **limits)
    assert not (tmp_path / "cache").exists()


def test_a_mask_in_any_order_is_the_same_entry(tmp_path):
    scan = a_scan(tmp_path)
    with build(scan, np.array([9, 3, 3, 5]), tmp_path / "cache", say=quiet) as store:
        np.testing.assert_array_equal(store.voxels, [3, 5, 9])
    assert find(scan, np.array([3, 5, 9]), tmp_path / "cache").key == store.key


def test_masks_that_do_not_fit(tmp_path):
    scan = a_scan(tmp_path)
    with pytest.raises(InputError, match=r"the mask for .*bold.nii.gz is empty"):
        build(scan, np.array([], np.int64), tmp_path / "cache", say=quiet)
    with pytest.raises(InputError, match=r"names voxel 210, but .* has voxels 0 to 209"):
        build(scan, np.array([3, 210]), tmp_path / "cache", say=quiet)
    with pytest.raises(InputError, match="names voxel -1"):
        gather_once(scan, {"roi": np.array([-1, 3])})
    with pytest.raises(InputError, match="give flat voxel indices"):
        build(scan, a_mask(), tmp_path / "cache", say=quiet)
    with pytest.raises(InputError, match="far names voxel 999"):
        build_and_gather(scan, None, {"far": np.array([999])}, tmp_path / "cache", say=quiet)
    assert not (tmp_path / "cache").exists() or litter(tmp_path / "cache") == []


def test_an_roi_outside_the_mask(tmp_path):
    scan, flat = a_scan(tmp_path), np.array([3, 5, 9])
    with build(scan, flat, tmp_path / "cache", say=quiet) as store:
        with pytest.raises(InputError, match="2 of 3 voxels lie outside the mask"):
            store.read(np.array([4, 5, 200]))
        assert store.read(np.array([], np.int64)).shape == (0, 9)
    with (
        build(scan, None, tmp_path / "cache", say=quiet) as store,
        pytest.raises(InputError, match="1 of 1 voxels"),
    ):
        store.read(np.array([210]))


def test_several_rois_in_one_pass_and_nothing_stored(tmp_path):
    scan = a_scan(tmp_path, shape=(5, 6, 7, 37), dtype=">i2")
    rois = {"a": np.array([5, 1, 100]), "b": np.flatnonzero(a_mask()), "none": np.array([], int)}
    for slab_bytes in (100, 4 << 20):
        found = gather_once(scan, rois, slab_bytes=slab_bytes)
        for name, flat in rois.items():
            np.testing.assert_array_equal(found[name], raw_of(scan, flat))
            assert found[name].dtype == np.dtype("=i2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bold.nii.gz"]


@pytest.mark.parametrize("name", ["a.nii", "a.img"])
def test_a_plain_scan_is_read_in_place(tmp_path, name):
    scan, flat = a_scan(tmp_path, name, dtype=">f4"), np.array([7, 3, 209, 0])
    np.testing.assert_array_equal(read_in_place(scan, flat), raw_of(scan, flat))
    os.truncate(scan.path, scan.size_bytes - 1)
    with pytest.raises(InputError, match="is not whole"):
        read_in_place(open_scan(scan.path), flat)


def test_what_is_compressed_is_not_read_in_place(tmp_path):
    with pytest.raises(InputError, match="is compressed"):
        read_in_place(a_scan(tmp_path), np.array([0]))


def test_an_entry_is_built_once(tmp_path, monkeypatch):
    scan, flat, told = a_scan(tmp_path), np.flatnonzero(a_mask()), []
    build(scan, flat, tmp_path / "cache", say=told.append).close()
    assert len(told) == 1
    assert f"bold.nii.gz: cached {flat.size} voxels" in told[0]
    assert "(isal) at" in told[0]
    monkeypatch.setattr(making, "slabs", None)  # another pass would fail
    again = build_and_gather(scan, flat, {"r": flat[:3]}, tmp_path / "cache", say=told.append)
    assert again.cached
    np.testing.assert_array_equal(again.series["r"], raw_of(scan, flat[:3]))
    assert find(scan, flat, tmp_path / "cache") is not None
    assert find(scan, flat[1:], tmp_path / "cache") is None
    assert len(told) == 1


def test_the_codec_is_kept_in_the_manifest(tmp_path):
    scan = a_scan(tmp_path)
    with build(scan, None, tmp_path / "c", codec=find_codec(["zlib"]), say=quiet) as store:
        manifest = json.loads(store.paths.manifest.read_text())
    assert manifest["codec"] == "zlib"
    assert manifest["slope"] == scan.slope
    assert manifest["source"]["path"] == str(scan.path.resolve())


def rewrite_behind_its_back(scan, raw, **kw):
    """Other values, the same size and mtime."""
    write_scan(scan.path, raw, slope=scan.slope, inter=scan.inter, **kw)
    os.utime(scan.path, ns=(scan.mtime_ns, scan.mtime_ns))
    changed = open_scan(scan.path)
    assert (changed.size_bytes, changed.mtime_ns) == (scan.size_bytes, scan.mtime_ns)
    return changed


@pytest.mark.parametrize("name", ["bold.nii", "bold.nii.gz"])
def test_stale_content_with_the_same_size_and_mtime_is_noticed(tmp_path, name):
    scan = a_scan(tmp_path, name, level=0)
    build(scan, None, tmp_path / "cache", say=quiet).close()
    raw = raw_values()
    raw[2, 3, 4, 5] ^= 1
    changed = rewrite_behind_its_back(scan, raw, level=0)
    assert changed.header_hash == scan.header_hash
    assert find(changed, None, tmp_path / "cache") is None
    with build(changed, None, tmp_path / "cache", say=quiet) as store:
        wanted = raw_of(changed, np.arange(210))
        np.testing.assert_array_equal(store.read(np.arange(210)), wanted)
    assert len(entries(tmp_path / "cache")) == 2


def test_a_changed_header_beside_unchanged_data_is_noticed(tmp_path):
    scan = a_scan(tmp_path, "a.img")
    build(scan, None, tmp_path / "cache", say=quiet).close()
    write_scan(scan.path, raw_values(), slope=2.0, inter=0.0)
    os.utime(scan.path, ns=(scan.mtime_ns, scan.mtime_ns))
    assert find(open_scan(scan.path), None, tmp_path / "cache") is None


def test_another_place_with_the_same_content_is_another_entry(tmp_path):
    scan = a_scan(tmp_path)
    copy = tmp_path / "copy.nii.gz"
    shutil.copy2(scan.path, copy)
    link = tmp_path / "link.nii.gz"
    link.symlink_to(scan.path)
    build(scan, None, tmp_path / "cache", say=quiet).close()
    assert find(open_scan(copy), None, tmp_path / "cache") is None
    assert find(open_scan(link), None, tmp_path / "cache") is not None


@pytest.mark.parametrize("cut", [2000, -6])
def test_a_truncated_gz_leaves_nothing(tmp_path, cut):
    scan = a_scan(tmp_path)
    scan.path.write_bytes(scan.path.read_bytes()[:cut])
    scan = open_scan(scan.path)
    for attempt in (build, lambda *a, **kw: build_and_gather(*a[:2], {}, *a[2:], **kw)):
        with pytest.raises(InputError, match="damaged or not whole"):
            attempt(scan, None, tmp_path / "cache", say=quiet)
        assert [path.name for path in (tmp_path / "cache").iterdir()] == ["room.lock"]


def test_a_crc_that_does_not_fit_leaves_nothing(tmp_path):
    scan = a_scan(tmp_path)
    data = bytearray(gzip.compress(gzip.decompress(scan.path.read_bytes()), mtime=0))
    data[-7] ^= 1
    scan.path.write_bytes(data)
    with pytest.raises(InputError, match="damaged or not whole"):
        build(open_scan(scan.path), None, tmp_path / "cache", say=quiet)
    assert litter(tmp_path / "cache") == []


def test_a_damaged_entry_is_noticed_and_built_again(tmp_path):
    scan, told = a_scan(tmp_path), []
    with build(scan, None, tmp_path / "cache", say=quiet) as store:
        folder, voxels = store.paths.folder, store.voxels
        wanted = store.read(voxels)
        with (folder / "data.npy").open("r+b") as file:
            file.seek(500)
            byte = file.read(1)
            file.seek(500)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(StoreCorrupt, match="are not what was written"):
            store.verify()
    for name in ("data.npy", "manifest.json"):
        os.truncate(folder / name, 300)
        with build(scan, None, tmp_path / "cache", say=told.append) as store:
            np.testing.assert_array_equal(store.read(store.voxels), wanted)
            store.verify()
        assert "removed, to be built again" in told[-2]
    assert litter(tmp_path / "cache") == []


def test_a_store_travels_as_a_handle(tmp_path):
    scan = a_scan(tmp_path, shape=(5, 6, 7, 500))
    store = build(scan, None, tmp_path / "cache", say=quiet)
    sent = pickle.dumps(store)
    assert len(sent) < 1000
    with pickle.loads(sent) as there:
        np.testing.assert_array_equal(there.read(np.arange(50)), store.read(np.arange(50)))
    store.close()
    with pytest.raises(InputError, match="is closed here"):
        store.read(np.arange(3))
    shutil.rmtree(store.paths.folder)
    with pytest.raises(MissingInput, match="build it again"):
        pickle.loads(sent)
    assert isinstance(store, VoxelStore)


MEMORY = """
import sys, threading, time
from pathlib import Path
import numpy as np
from voxel_kit import quiet
from raypipe.read.nifti import find_codec, open_scan
from raypipe.store.voxels import build_and_gather
def anon():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith("RssAnon"))
scan, flat = open_scan(sys.argv[1]), np.arange(0, 64 * 64 * 40, 3)
find_codec()
before, peak, done = anon(), 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anon())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
build_and_gather(scan, flat, {"roi": flat[:1000]}, Path(sys.argv[2]), say=quiet).store()
done.set()
thread.join()
print(peak - before)
"""


def test_a_build_stays_small_beside_its_scan(tmp_path):
    """105 MB unpacked; the same for twice the volumes."""
    growth = []
    for volumes in (80, 160):
        raw = np.zeros((64, 64, 40, volumes), "<f4")
        path = write_scan(tmp_path / f"{volumes}.nii.gz", raw, level=1)
        builder = start(MEMORY, path, tmp_path / "cache")
        growth.append(int(builder.communicate()[0]) >> 10)
    assert max(growth) < 45, growth  # MiB
    assert growth[1] - growth[0] < 8, growth
