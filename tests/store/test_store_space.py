"""Disks that are full, that fill up, that cannot preallocate; and the memory of a writer."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from store_kit import abandon, beside, fill, make_spec, rows_of, sources_of, start, whole

from raypipe.errors import NoSpace, StoreError
from raypipe.store import (
    FeatureStore,
    ShardWriter,
    open_for_writing,
    require_space,
    space_needed,
    verify,
)
from raypipe.store import space as space_module


@pytest.fixture
def plain_disk(mount):
    """A ramfs: no fallocate, and it does not say how much is free."""
    return mount("ramfs", "mode=0755")


def hog(folder: Path, leave_bytes: int) -> Path:
    """Fill the disk but for ``leave_bytes``."""
    stat = os.statvfs(folder)
    path = folder / "hog"
    path.write_bytes(b"x" * (stat.f_bavail * stat.f_frsize - leave_bytes))
    return path


def test_a_store_that_does_not_fit_is_refused_before_anything_is_written(small_disk):
    spec = make_spec(small_disk, rows=100, row_shape=(4096,))
    with pytest.raises(NoSpace) as caught:
        open_for_writing(spec, run_id="r")
    free = os.statvfs(small_disk).f_bavail * 4096
    assert f"needs {space_needed(spec)} bytes" in str(caught.value)
    assert f"{free} (1.00 MiB) are free" in str(caught.value)
    assert list(small_disk.iterdir()) == []
    assert caught.value.exit_code == 3


def test_preallocation_that_fails_leaves_nothing(small_disk, monkeypatch):
    """The space check passes (another process fills the disk just after): fallocate says no."""
    spec = make_spec(small_disk, rows=100, row_shape=(4096,))
    monkeypatch.setattr("raypipe.store.run.require_space", lambda needs: None)
    with pytest.raises(NoSpace, match=rf"needs {spec.nbytes} bytes"):
        open_for_writing(spec, run_id="r")
    assert beside(spec) == []
    stat = os.statvfs(small_disk)
    assert stat.f_bfree > stat.f_blocks - 8  # folders only


def test_preallocation_that_fails_cuts_back_to_what_was_there(small_disk):
    path = small_disk / "x"
    path.write_bytes(b"kept" * 1024)
    fd = os.open(path, os.O_RDWR)
    with pytest.raises(NoSpace, match="needs 3995904 bytes"):
        space_module.preallocate(fd, path, 4_000_000)
    os.close(fd)
    assert path.read_bytes() == b"kept" * 1024


def test_a_preallocated_store_cannot_run_out_of_space_for_data(small_disk):
    spec = make_spec(small_disk, rows=40, row_shape=(4096,))
    with open_for_writing(spec, run_id="r") as run:
        fat = hog(small_disk, 0)
        with ShardWriter(run.target, "w") as out:
            out.write(0, rows_of(spec, 0, 4), sources_of(0, 4))
            with pytest.raises(NoSpace):  # no room for the journal: not committed, not lost
                out.commit()
            fat.unlink()
            assert [record.lo for record in out.commit()] == [0]
        run.refresh()
        assert len(run.missing()) == 9


def test_full_disk_at_every_size_when_committing_and_sealing(small_disk):
    """Whatever room is left, it ends in NoSpace or in a whole store; later it goes on."""
    refusals = 0
    for pages in range(12):
        spec = make_spec(small_disk / str(pages), rows=40, row_shape=(64,))
        run = open_for_writing(spec, run_id="r")
        fat = hog(small_disk, pages * 4096)
        try:
            fill(run)
            run.seal()
        except NoSpace as error:
            refusals += 1
            assert "free some" in str(error)
        run.close()
        fat.unlink()
        whole(spec)
        assert verify(spec.path).ok
        np.testing.assert_array_equal(FeatureStore.open(spec.path).array, rows_of(spec, 0, 40))
        shutil.rmtree(small_disk / str(pages))
    assert 3 <= refusals < 12


def test_opening_on_a_full_disk_again_and_again(small_disk):
    spec = make_spec(small_disk, rows=40, row_shape=(64,))
    run = open_for_writing(spec, run_id="r")
    fill(run)
    abandon(run)
    fat = hog(small_disk, 0)
    for _ in range(3):
        with pytest.raises(NoSpace):
            open_for_writing(spec, run_id="r")
    fat.unlink()
    with open_for_writing(spec, run_id="r") as run:
        assert run.missing() == []
        run.seal()


def test_sparse_file_that_fills_the_disk_while_written(small_disk, monkeypatch, caplog):
    monkeypatch.setattr(space_module, "_fallocate", lambda fd, size: errno.EOPNOTSUPP)
    spec = make_spec(small_disk, rows=40, row_shape=(4096,))
    with open_for_writing(spec, run_id="r") as run:
        assert (
            "is not preallocated (sparse: fallocate says 'Operation not supported')" in caplog.text
        )
        fat = hog(small_disk, 70_000)
        with ShardWriter(run.target, "w") as out:
            out.write(0, rows_of(spec, 0, 4), sources_of(0, 4))
            with pytest.raises(NoSpace, match="needs 65536 bytes"):
                out.write(4, rows_of(spec, 4, 8), sources_of(4, 8))
            fat.unlink()
            assert [record.lo for record in out.commit()] == [0]  # [4, 8) was never written
            run.refresh()
            for lo, hi in run.missing():
                out.write(lo, rows_of(spec, lo, hi), sources_of(lo, hi))
            out.commit()
        run.seal(verify=True)
    assert FeatureStore.open(spec.path).manifest["preallocation"].startswith("sparse")


def test_a_filesystem_without_fallocate_or_free_count(plain_disk, caplog):
    spec = make_spec(plain_disk)
    whole(spec)
    assert (
        FeatureStore.open(spec.path).manifest["preallocation"].startswith("sparse: fallocate says")
    )
    assert "does not say how much space is free" in caplog.text
    assert verify(spec.path).ok


def test_needs_on_one_disk_are_summed(small_disk, tmp_path):
    half = 600_000
    require_space({small_disk / "a" / "b.npy": half, tmp_path / "c.npy": half})
    with pytest.raises(NoSpace, match="needs 1200000 bytes"):
        require_space({small_disk / "a.npy": half, small_disk / "x" / "b.npy": half})


def test_space_needed_counts_what_is_there(tmp_path):
    spec = make_spec(tmp_path, rows=64, row_shape=(8192,))
    assert space_needed(spec) > spec.nbytes
    run = open_for_writing(spec, run_id="r")
    assert space_needed(spec) < spec.nbytes // 2
    run.close()
    whole(spec)
    assert space_needed(spec) == 0


def test_file_size_limit_is_no_space(tmp_path):
    code = """
import resource, sys
from store_kit import make_spec
from raypipe.errors import NoSpace
from raypipe.store import open_for_writing
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    open_for_writing(make_spec(sys.argv[1], rows=64, row_shape=(8192,)), run_id="r")
except NoSpace as error:
    print("NoSpace", error)
"""
    limited = start(code, tmp_path)
    assert limited.stdout.read().startswith("NoSpace")
    limited.wait()
    limited.stdout.close()


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_short_writes(tmp_path, monkeypatch, chunk):
    real_pwrite, real_write = os.pwrite, os.write
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real_pwrite(fd, data[:chunk], at))
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:chunk]))
    spec = make_spec(tmp_path)
    whole(spec)
    monkeypatch.undo()
    np.testing.assert_array_equal(np.load(spec.path), rows_of(spec, 0, 10))
    assert verify(spec.path).ok


def test_data_that_do_not_reach_the_disk_are_never_committed(tmp_path, monkeypatch):
    """After a failed fdatasync the kernel calls lost pages clean: a second one would succeed."""
    spec = make_spec(tmp_path)
    with open_for_writing(spec, run_id="r") as run:
        with ShardWriter(run.target, "w") as out:
            out.write(0, rows_of(spec, 0, 4), sources_of(0, 4))

            def fail(fd):
                raise OSError(errno.EIO, "Input/output error")

            monkeypatch.setattr(os, "fdatasync", fail)
            with pytest.raises(StoreError, match="Input/output error"):
                out.commit()
            monkeypatch.undo()
            with pytest.raises(StoreError, match="did not reach the disk"):
                out.write(0, rows_of(spec, 0, 4), sources_of(0, 4))
            with pytest.raises(StoreError, match="did not reach the disk"):
                out.commit()  # not "nothing to do": rows were lost
        run.refresh()
        assert len(run.missing()) == 3


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    def refuse(path, *args, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(StoreError, match=r"cannot be written \(Permission denied\)"):
        open_for_writing(make_spec(tmp_path / "deep"), run_id="r")


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from store_kit import make_spec, sources_of
from raypipe.store import ShardWriter, open_for_writing
def anon():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith("RssAnon"))
cells, dtype = int(sys.argv[2]), sys.argv[3]
spec = make_spec(sys.argv[1], rows=8 * cells, row_shape=(256, 1024), grid=8, dtype=dtype)
rows = np.random.default_rng(0).normal(size=(8, 256, 1024)).astype("f4")
with open_for_writing(spec, run_id="r") as run, ShardWriter(run.target, "w") as out:
    before, peak = anon(), 0
    for lo, hi in run.missing():
        out.write(lo, rows, sources_of(lo, hi, bad=[lo]))
        peak = max(peak, anon())
        out.commit()
    print(peak - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_writers_memory_is_scratch_only(tmp_path, dtype):
    """8 MiB batches: anonymous memory grows by less than one of them, for 4 cells or for 24."""
    growth = []
    for cells in (4, 24):
        writer = start(MEMORY, tmp_path / str(cells), cells, dtype)
        growth.append(int(writer.stdout.read()))
        writer.wait()
        writer.stdout.close()
        shutil.rmtree(tmp_path / str(cells))
    assert max(growth) < 3 * 1024, growth  # KiB
    assert abs(growth[1] - growth[0]) < 1024, growth
