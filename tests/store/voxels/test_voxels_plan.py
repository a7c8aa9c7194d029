"""Read plans against plain indexing; which of several entries goes; which way is chosen."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nifti_kit import unscaled
from voxel_kit import a_mask, a_scan, entries, quiet

from raypipe.store.voxels import build, choose_way, find, obtain, read_plan, reader
from raypipe.store.voxels.decide import Reads
from raypipe.store.voxels.quota import Held, eviction_order
from raypipe.store.voxels.reader import scale

ROWS = st.lists(st.integers(0, 300), max_size=80)


@given(ROWS, st.integers(1, 5000), st.integers(0, 20000), st.booleans())
def test_a_plan_gives_out_what_was_asked(rows, row_bytes, run_bytes, use_memmap):
    asked = np.array(rows, dtype=np.int64)
    plan = read_plan(asked, row_bytes, run_bytes=run_bytes, use_memmap=use_memmap)
    given_out = plan.rows if plan.give_out is None else plan.rows[plan.give_out]
    np.testing.assert_array_equal(given_out, asked)
    assert (np.diff(plan.rows) > 0).all()
    runs = [plan.rows[a:b] for a, b in pairwise(plan.starts)]
    assert len(runs) == plan.n_runs
    np.testing.assert_array_equal(np.concatenate([*runs, asked[:0]]), plan.rows)
    assert all((np.diff(run) == 1).all() and run.size for run in runs)
    assert all(b[0] > a[-1] + 1 for a, b in pairwise(runs))


@given(ROWS)
def test_few_bytes_a_run_go_through_the_map(rows):
    asked = np.array(rows, dtype=np.int64)
    plan = read_plan(asked, 10, run_bytes=50)
    mean = plan.rows.size * 10 / max(1, plan.n_runs)
    assert (plan.way == "memmap") == (mean < 50)
    assert read_plan(asked, 10, run_bytes=50, use_memmap=False).way == "preadv"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """(store, its raw values by plain indexing (x*y*z, t), flat mask)."""
    folder = tmp_path_factory.mktemp("kept")
    scan, flat = a_scan(folder, shape=(9, 8, 7, 11)), np.flatnonzero(a_mask((9, 8, 7)))
    with build(scan, flat, folder / "cache", say=quiet) as store:
        yield store, unscaled(scan.path).reshape(-1, 11), flat


@given(data=st.data())
@pytest.mark.parametrize("run_bytes", [0, 60, 1 << 30])
def test_reads_are_plain_indexing(kept, run_bytes, data):
    store, plain, flat = kept
    picked = data.draw(st.lists(st.integers(0, flat.size - 1), max_size=60))
    if data.draw(st.booleans()):
        picked = sorted(set(picked))
    voxels = flat[np.array(picked, dtype=np.int64)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            reader, "read_plan", lambda rows, size, **kw: read_plan(rows, size, run_bytes=run_bytes)
        )
        found = store.read(voxels)
    np.testing.assert_array_equal(found, plain[voxels])
    assert found.flags.writeable


@given(
    st.integers(0, 40),
    st.integers(1, 30),
    st.floats(-1e3, 1e3).filter(lambda slope: abs(slope) > 1e-6),
    st.floats(-1e6, 1e6),
)
def test_scaling_is_float64s_rounded_once(n, t, slope, inter):
    raw = np.random.default_rng(0).integers(-32768, 32767, (n, t)).astype("<i2")
    found = scale(raw, slope, inter)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, (raw.astype("f8") * slope + inter).astype("f4"))


def test_scaling_in_blocks(monkeypatch):
    monkeypatch.setattr(reader, "_SCALE_BYTES", 100)
    raw = np.random.default_rng(0).normal(size=(57, 5)).astype("f4")
    wanted = (raw.astype("f8") * 3.7 - 2).astype("f4")
    np.testing.assert_array_equal(scale(raw, 3.7, -2.0), wanted)
    assert scale(raw, 1.0, 0.0) is raw


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=12))
def test_stale_entries_go_first_then_the_longest_unused(facts):
    held = [
        Held(key=str(k), size_bytes=1, used_ns=used, stale=stale)
        for k, (used, stale) in enumerate(facts)
    ]
    order = eviction_order(held)
    assert sorted(order, key=lambda e: e.key) == sorted(held, key=lambda e: e.key)
    n_stale = sum(entry.stale for entry in held)
    assert all(entry.stale for entry in order[:n_stale])
    for part in (order[:n_stale], order[n_stale:]):
        assert [e.used_ns for e in part] == sorted(e.used_ns for e in part)


def way(**changes):
    facts = {
        "compressed": True,
        "data_bytes": 1_155_000_000,
        "entry_bytes": 300_000_000,
        "n_volumes": 320,
        "itemsize": 4,
        "reads": Reads(voxels=5000, times=20),
        "cached": False,
        "may_store": True,
        **changes,
    }
    return choose_way(**facts)


def test_which_way():
    assert way().name == "build"
    assert way(cached=True).name == "cached"
    assert way(may_store=False).name == "one pass"
    assert way(reads=Reads(voxels=5000, times=1)).name == "one pass"
    assert way(compressed=False, reads=Reads(voxels=500, times=20)).name == "in place"
    assert way(compressed=False, reads=Reads(voxels=100_000, times=100)).name == "build"
    assert way(compressed=False, may_store=False).name == "in place"
    everything = Reads(voxels=900_000, times=1)
    assert way(compressed=False, may_store=False, reads=everything).name == "one pass"


@pytest.mark.parametrize(
    ("name", "store", "reads", "chosen"),
    [
        ("a.nii.gz", True, 20, "build"),
        ("a.nii.gz", False, 20, "one pass"),
        ("a.nii", True, 1, "in place"),
        ("a.nii", False, 1, "in place"),
    ],
)
def test_rois_from_wherever_they_come_soonest(tmp_path, name, store, reads, chosen):
    scan, told = a_scan(tmp_path, name, shape=(5, 6, 7, 90)), []
    cache = tmp_path / "cache" if store else None
    rois = {"a": np.array([3, 9]), "b": np.array([200, 7])}
    found = obtain(scan, rois, cache_dir=cache, expected_reads=reads, say=told.append)
    assert found.way.name == chosen
    assert f": {chosen}" in told[0]
    assert ("unpacked by isal" in told[0]) == scan.compressed
    plain = unscaled(scan.path).reshape(-1, 90)
    for roi, flat in rois.items():
        np.testing.assert_array_equal(found.raw[roi], plain[flat])
        np.testing.assert_allclose(
            found.scaled(roi), plain[flat] * scan.slope + scan.inter, rtol=1e-6
        )
    if chosen == "build":
        assert found.pending.store().key in entries(cache)
        again = obtain(scan, rois, cache_dir=cache, say=told.append)
        assert again.way.name == "cached"
        np.testing.assert_array_equal(again.raw["b"], plain[[200, 7]])
    else:
        assert not (tmp_path / "cache").exists() or find(scan, None, cache) is None
