"""Disks that are full before a build, or fill up in any step of it."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
from voxel_kit import a_scan, entries, litter, quiet

from raypipe.errors import NoSpace, StoreError
from raypipe.read.nifti import open_scan
from raypipe.store import space as space_module
from raypipe.store.voxels import build, build_and_gather, find
from raypipe.store.voxels.quota import missing_bytes


def test_an_entry_that_does_not_fit_is_refused_before_anything_is_written(small_disk, tmp_path):
    scan = a_scan(tmp_path, shape=(20, 20, 20, 60))  # 0.96 MB twice, on a disk of 1 MiB
    with pytest.raises(NoSpace, match="too few are left") as caught:
        build(scan, None, small_disk / "cache", say=quiet)
    assert caught.value.exit_code == 3
    assert litter(small_disk / "cache") == []


def test_old_entries_make_room_on_the_disk(small_disk, tmp_path):
    """No quota: 0.3 MB an entry, the same again while it is built, on a disk of 1 MiB."""
    scans = [a_scan(tmp_path, f"{k}.nii.gz", shape=(20, 20, 20, 19), seed=k) for k in range(4)]
    for scan in scans:
        with build(scan, None, small_disk / "cache", say=quiet) as store:
            store.verify()
    assert find(scans[-1], None, small_disk / "cache") is not None
    assert find(scans[0], None, small_disk / "cache") is None
    assert litter(small_disk / "cache") == []


def fail_at(monkeypatch, nth):
    """ENOSPC from the ``nth`` pwrite on; the count of calls."""
    real, calls = os.pwrite, []

    def pwrite(fd, data, offset):
        calls.append(offset)
        if len(calls) >= nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return calls


@pytest.mark.parametrize("nth", [1, 2, 5, 10, 11, 13])
def test_a_disk_that_fills_up_in_any_step(tmp_path, monkeypatch, nth):
    """1 header, 9 volumes into the spool, then the turned cells."""
    scan, cache = a_scan(tmp_path), tmp_path / "cache"
    monkeypatch.setattr(space_module, "_fallocate", lambda fd, size: errno.EOPNOTSUPP)
    calls = fail_at(monkeypatch, nth)
    with pytest.raises(NoSpace, match=r"needs .* bytes") as caught:
        build(scan, None, cache, block_bytes=3000, say=quiet)
    assert len(calls) >= nth
    assert caught.value.exit_code == 3
    assert litter(cache) == []
    assert entries(cache) == []
    monkeypatch.undo()
    with build(scan, None, cache, say=quiet) as store:
        store.verify()


def test_a_disk_that_fills_up_behind_the_first_answer(tmp_path, monkeypatch):
    scan, cache, told = a_scan(tmp_path), tmp_path / "cache", []
    fail_at(monkeypatch, 11)
    pending = build_and_gather(scan, None, {"r": np.arange(7)}, cache, say=told.append)
    with pytest.raises(NoSpace):
        pending.store()
    assert pending.series["r"].shape == (7, 9)
    assert "bold.nii.gz: not kept in the cache: " in told[-1]
    assert litter(cache) == []


def test_preallocation_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(space_module, "_fallocate", lambda fd, size: errno.ENOSPC)
    with pytest.raises(NoSpace):
        build(a_scan(tmp_path), None, tmp_path / "cache", say=quiet)
    assert litter(tmp_path / "cache") == []


def test_data_that_do_not_reach_the_disk(tmp_path, monkeypatch):
    def fail(fd):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match="Input/output error"):
        build(a_scan(tmp_path), None, tmp_path, say=quiet)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir() if "lock" not in path.name] == ["bold.nii.gz"]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_short_writes(tmp_path, monkeypatch, chunk):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:chunk], at))
    scan = a_scan(tmp_path)
    with build(scan, None, tmp_path / "cache", say=quiet) as store:
        monkeypatch.undo()
        store.verify()
        exact = open_scan(scan.path).shape
    assert exact == (5, 6, 7, 9)


def test_what_must_go():
    assert missing_bytes(used=50, need=30, quota=100, free=1000, scratch=30) == 0
    assert missing_bytes(used=80, need=30, quota=100, free=1000, scratch=30) == 10
    assert missing_bytes(used=50, need=30, quota=None, free=40, scratch=30) == 20
    assert missing_bytes(used=80, need=30, quota=100, free=40, scratch=30) == 20
    assert missing_bytes(used=80, need=30, quota=None, free=None, scratch=30) == 0
