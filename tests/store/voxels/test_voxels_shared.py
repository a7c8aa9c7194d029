"""One cache and several processes: building at once, killed in a build, reading while room is made."""

from __future__ import annotations

import os
import signal
import time

import nibabel as nib
import numpy as np
import pytest
from voxel_kit import a_mask, a_scan, entries, litter, quiet, start

from raypipe.errors import NoSpace, StoreLocked
from raypipe.read.nifti import open_scan
from raypipe.store.voxels import VoxelStore, build, build_and_gather, find

BUILD = """
import sys, time
from pathlib import Path
import numpy as np
from raypipe.read.nifti import open_scan
from raypipe.store.voxels import build, making
path, cache, pause_s = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
real = making.slabs
def slow(*args):
    for slab in real(*args):
        yield slab
        print("slab", flush=True)
        time.sleep(pause_s) if pause_s >= 0 else input()
making.slabs = slow
with build(open_scan(path), None, cache, block_bytes=1 << 12, say=print) as store:
    print("sum", store.read(store.voxels).sum(dtype="i8"))
"""


def sum_of(scan):

    return int(np.asarray(nib.load(scan.path).dataobj.get_unscaled()).sum(dtype="i8"))


def test_two_processes_building_one_cache(tmp_path):
    scan = a_scan(tmp_path, shape=(5, 6, 7, 60))
    both = [start(BUILD, scan.path, tmp_path / "cache", 0.02) for _ in range(2)]
    said = [process.communicate()[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    built = [any("cached 210 voxels" in line for line in lines) for lines in said]
    passed = [lines.count("slab") > 0 for lines in said]
    assert sorted(built) == sorted(passed) == [False, True]
    assert [lines[-1] for lines in said] == [f"sum {sum_of(scan)}"] * 2
    assert len(entries(tmp_path / "cache")) == 1
    assert litter(tmp_path / "cache") == []


def test_a_second_process_waits_for_the_first(tmp_path):
    scan = a_scan(tmp_path, shape=(5, 6, 7, 60))
    first = start(BUILD, scan.path, tmp_path / "cache", -1)
    assert first.stdout.readline() == "slab\n"
    second = start(BUILD, scan.path, tmp_path / "cache", 0)
    assert second.stdout.readline() == (
        f"bold.nii.gz: waiting for pid {first.pid}, which builds its cache entry\n"
    )
    said = first.communicate("go on\n" * 60)[0]
    assert said.endswith(f"sum {sum_of(scan)}\n")
    assert second.communicate()[0] == f"sum {sum_of(scan)}\n"


@pytest.fixture
def half_built(tmp_path):
    """(scan, cache, process that builds it, for ever)."""
    scan = a_scan(tmp_path, shape=(5, 6, 7, 60))
    process = start(BUILD, scan.path, tmp_path / "cache", 60)
    assert process.stdout.readline() == "slab\n"
    yield scan, tmp_path / "cache", process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_half_built_entry_is_never_read(half_built):
    scan, cache, process = half_built
    assert find(scan, None, cache) is None
    assert entries(cache) == []
    with pytest.raises(StoreLocked, match=rf"is being built by pid {process.pid}"):
        build(scan, None, cache, wait_s=0, say=quiet)
    started = time.monotonic()
    with pytest.raises(StoreLocked):
        build(scan, None, cache, wait_s=0.2, say=quiet)
    assert 0.2 <= time.monotonic() - started < 5


def test_who_does_not_wait_reads_in_one_pass(half_built):
    scan, cache, _ = half_built
    told = []
    pending = build_and_gather(
        scan, None, {"all": np.arange(210)}, cache, wait_s=0, say=told.append
    )
    assert pending.series["all"].sum(dtype="i8") == sum_of(scan)
    assert pending.store() is None
    assert "nothing stored" in told[0]
    assert entries(cache) == []


def test_killed_in_a_build(half_built):
    scan, cache, process = half_built
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = cache.glob(".*.building")
    assert sorted(path.name for path in left.iterdir()) == ["data.npy", "spool"]
    assert find(scan, None, cache) is None
    with build(scan, None, cache, wait_s=0, say=quiet) as store:
        assert store.read(store.voxels).sum(dtype="i8") == sum_of(scan)
        store.verify()
    assert litter(cache) == []


KILLED_AT = """
import sys, time
from pathlib import Path
from raypipe.read.nifti import open_scan
from raypipe.store.voxels import build, making
step = sys.argv[3]
real = getattr(making, step)
def stop(*args, **options):
    real(*args, **options)
    print("here", flush=True)
    time.sleep(60)
setattr(making, step, stop)
build(open_scan(Path(sys.argv[1])), None, Path(sys.argv[2]), say=lambda text: None)
"""


@pytest.mark.parametrize(
    ("step", "whole"),
    [("make_room", False), ("turn", False), ("write_atomic", False), ("fsync_dir", True)],
)
def test_killed_after_any_step(tmp_path, step, whole):
    scan, cache = a_scan(tmp_path), tmp_path / "cache"
    process = start(KILLED_AT, scan.path, cache, step)
    assert process.stdout.readline() == "here\n"
    process.kill()
    process.communicate()
    assert (find(scan, None, cache) is not None) == whole
    with build(scan, None, cache, wait_s=0, say=quiet) as store:
        store.verify()
        assert store.read(store.voxels).sum(dtype="i8") == sum_of(scan)
    assert litter(cache) == []


def test_another_build_tidies_up_too(half_built, tmp_path):
    _, cache, process = half_built
    other = a_scan(tmp_path, "other.nii.gz")
    build(other, None, cache, say=quiet).close()
    assert len(list(cache.glob(".*.building"))) == 1  # its process lives
    process.kill()
    process.wait()
    third = a_scan(tmp_path, "third.nii.gz")
    build(third, None, cache, say=quiet).close()
    assert litter(cache) == []
    assert len(entries(cache)) == 2


def test_what_another_process_builds_counts_against_the_quota(half_built, tmp_path):
    _, cache, _ = half_built
    other = a_scan(tmp_path, "other.nii.gz", shape=(5, 6, 7, 60))
    with pytest.raises(NoSpace, match="in use"):
        build(other, None, cache, quota_bytes=60_000, say=quiet)
    build(other, None, cache, quota_bytes=250_000, say=quiet).close()


def some_scans(folder, count):
    """Each another entry."""
    return [a_scan(folder, f"{k}.nii.gz", seed=k) for k in range(count)]


QUOTA = 30_000  # an entry takes 6.5 kB, and 22 kB are reckoned when it is made: room for two


def test_the_entry_used_longest_ago_goes_first(tmp_path):
    cache, scans, told = tmp_path / "cache", some_scans(tmp_path, 4), []
    for scan in scans[:2]:
        build(scan, None, cache, quota_bytes=QUOTA, say=quiet).close()
        time.sleep(0.01)
    find(scans[0], None, cache).close()  # used again: now 1 is the oldest
    build(scans[2], None, cache, quota_bytes=QUOTA, say=told.append).close()
    assert [find(scan, None, cache) is not None for scan in scans] == [True, False, True, False]
    assert sum("removed" in line for line in told) == 1
    assert litter(cache) == []


def test_an_entry_of_a_scan_that_has_changed_goes_before_all(tmp_path):
    cache, scans = tmp_path / "cache", some_scans(tmp_path, 2)
    for scan in scans:
        build(scan, None, cache, quota_bytes=QUOTA, say=quiet).close()
        time.sleep(0.01)
    changed = a_scan(tmp_path, "1.nii.gz", seed=7)
    build(changed, None, cache, quota_bytes=QUOTA, say=quiet).close()
    assert find(scans[0], None, cache) is not None  # older, and kept
    assert len(entries(cache)) == 2


HOLD = """
import sys
from pathlib import Path
from raypipe.store.voxels import VoxelStore
store = VoxelStore.open(Path(sys.argv[1]), sys.argv[2])
print("open", flush=True)
input()
print(store.read(store.voxels).sum(dtype="i8"))
"""


def test_what_a_process_reads_is_not_removed(tmp_path):
    cache, scans = tmp_path / "cache", some_scans(tmp_path, 4)
    with build(scans[0], None, cache, say=quiet) as store:
        key = store.key
    reader = start(HOLD, cache, key)
    assert reader.stdout.readline() == "open\n"
    time.sleep(0.01)
    for scan in scans[1:]:  # each needs room, and the reader's entry is the oldest
        build(scan, None, cache, quota_bytes=QUOTA, say=quiet).close()
        assert key in entries(cache)
    assert len(entries(cache)) == 2
    assert reader.communicate("go on\n")[0] == f"{sum_of(scans[0])}\n"
    build(scans[1], None, cache, quota_bytes=QUOTA, say=quiet).close()
    assert key not in entries(cache)


def test_a_quota_that_readers_fill(tmp_path):
    cache, scans = tmp_path / "cache", some_scans(tmp_path, 3)
    held = [build(scan, None, cache, say=quiet) for scan in scans[:2]]
    with pytest.raises(NoSpace, match="what remains is in use") as caught:
        build(scans[2], None, cache, quota_bytes=QUOTA, say=quiet)
    assert caught.value.exit_code == 3
    assert len(entries(cache)) == 2
    assert litter(cache) == []
    held.pop()  # gone without close: its lock goes with it
    build(scans[2], None, cache, quota_bytes=QUOTA, say=quiet).close()
    assert len(entries(cache)) == 2
    np.testing.assert_equal(held[0].read(held[0].voxels).sum(dtype="i8"), sum_of(scans[0]))


def test_an_entry_above_the_quota(tmp_path):
    with pytest.raises(NoSpace, match="raise the quota, give a smaller mask"):
        build(a_scan(tmp_path), None, tmp_path / "cache", quota_bytes=1000, say=quiet)
    assert litter(tmp_path / "cache") == []


def test_a_forked_child_reads_under_a_lock_of_its_own(tmp_path):
    scan, mask = a_scan(tmp_path), np.flatnonzero(a_mask())
    store = build(scan, mask, tmp_path / "cache", say=quiet)
    wanted = store.read(mask)
    child = os.fork()
    if child == 0:
        same = np.array_equal(store.read(mask), wanted) and store._lock.fd >= 0
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(store.read(mask), wanted)
    store.close()


def test_opening_what_is_not_there(tmp_path):
    (tmp_path / "cache").mkdir()
    with pytest.raises(Exception, match="build it again"):
        VoxelStore.open(tmp_path / "cache", "0" * 32)
    assert list((tmp_path / "cache").iterdir()) == []
    assert open_scan(a_scan(tmp_path).path).n_volumes == 9
