"""Crashes between any two file operations: processes that die, machines that lose power.

Whatever happens, the same call goes on, computes nothing again that was acknowledged, and ends
with the bytes of an unbroken run.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from power_cut import PowerCut
from store_kit import (
    SEALED_FILES,
    abandon,
    beside,
    fill,
    make_spec,
    rows_of,
    sources_of,
    start,
    whole,
)

from raypipe.errors import FingerprintMismatch, MissingInput, StoreCorrupt, StoreError
from raypipe.store import (
    FeatureStore,
    ShardWriter,
    open_for_writing,
    verify,
)


@pytest.fixture
def unbroken(tmp_path):
    """(data, index) bytes of a shard made without a crash."""
    spec = make_spec(tmp_path / "unbroken")
    whole(spec, bad=[5])
    return spec.path.read_bytes(), spec.paths.index.read_bytes()


def attempt(spec, acknowledged, **options):
    """One run; notes each range that a commit acknowledged, checks that none comes up again."""
    with open_for_writing(spec, run_id="r", **options) as run:
        assert not acknowledged & set(run.missing())
        if not run.sealed:
            fill(run, bad=[5], done=lambda lo, hi: acknowledged.add((lo, hi)))
        run.seal()


def assert_whole(spec, unbroken):
    assert (spec.path.read_bytes(), spec.paths.index.read_bytes()) == unbroken
    assert beside(spec) == SEALED_FILES
    assert verify(spec.path, threads=1).ok


def count_operations(root: Path, work) -> int:
    cut = PowerCut(root)
    assert not cut.run(work, None)
    return cut.operations


@pytest.mark.parametrize("luck", [None, 1, 2])
def test_power_cut_at_every_operation(tmp_path, unbroken, luck):
    total = count_operations(fresh(tmp_path), lambda: attempt(make_spec(tmp_path / "disk"), set()))
    assert total > 50
    for stop_at in range(total):
        root, acknowledged = fresh(tmp_path), set()
        spec = make_spec(root)
        cut = PowerCut(root)
        assert cut.run(lambda s=spec, a=acknowledged: attempt(s, a), stop_at)
        cut.restore(None if luck is None else random.Random(f"{luck} {stop_at}"))
        attempt(spec, acknowledged)
        assert_whole(spec, unbroken)


def test_power_cuts_in_a_row(tmp_path, unbroken):
    """A crash in the recovery from a crash in a recovery."""
    for seed in range(60):
        luck = random.Random(seed)
        root, acknowledged = fresh(tmp_path), set()
        spec = make_spec(root)
        for _ in range(4):
            cut = PowerCut(root)
            if not cut.run(lambda s=spec, a=acknowledged: attempt(s, a), luck.randrange(80)):
                break
            cut.restore(luck if seed % 2 else None)
        attempt(spec, acknowledged)
        assert_whole(spec, unbroken)


def test_power_cut_while_replacing_another_store(tmp_path, unbroken):
    def other(root):
        return make_spec(root, row_shape=(7,), identity={"backbone": "clip"})

    def replace():
        attempt(make_spec(tmp_path / "disk"), set(), overwrite=True)

    whole(other(fresh(tmp_path)))
    total = count_operations(tmp_path / "disk", replace)
    for stop_at in range(total):
        root = fresh(tmp_path)
        whole(other(root))
        cut = PowerCut(root)
        assert cut.run(replace, stop_at)
        cut.restore(random.Random(stop_at) if stop_at % 2 else None)
        spec = make_spec(root)
        if spec.path.exists():  # whatever reads it now gets one whole store or a refusal
            with contextlib.suppress(StoreError, MissingInput):
                FeatureStore.open(spec.path).valid.sum()
        # Half removed is not damaged: without --overwrite the other store stands, or is gone.
        for asked in (spec, other(root)):
            with contextlib.suppress(FingerprintMismatch):
                open_for_writing(asked, run_id="r").close()
        attempt(spec, set(), overwrite=True)
        assert_whole(spec, unbroken)


def fresh(tmp_path):
    import shutil

    root = tmp_path / "disk"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    return root


def test_death_at_every_operation(tmp_path, unbroken):
    """A process that dies leaves all that it wrote so far, synced or not, and no handler runs."""
    total = count_operations(fresh(tmp_path), lambda: attempt(make_spec(tmp_path / "disk"), set()))
    for stop_at in range(total):
        root = fresh(tmp_path)
        child = os.fork()
        if child == 0:
            cut = PowerCut(root)
            cut._note_current = lambda: os._exit(9)
            cut.run(lambda root=root: attempt(make_spec(root), set()), stop_at)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        spec = make_spec(root)
        attempt(spec, set())
        assert_whole(spec, unbroken)


DRIVER = """
import sys, time
from pathlib import Path
from store_kit import fill, make_spec
from raypipe.store import open_for_writing
spec = make_spec(Path(sys.argv[1]), rows=400, row_shape=(16, 64))
with open_for_writing(spec, run_id="victim") as run:
    print("open", flush=True)
    fill(run, done=lambda lo, hi: print(lo, hi, flush=True))
    run.seal()
"""


def test_kill_9_of_the_driver_again_and_again(tmp_path):
    """Real processes, real kill -9, at whatever moment it comes."""
    spec = make_spec(tmp_path / "killed", rows=400, row_shape=(16, 64))
    unbroken = make_spec(tmp_path / "unbroken", rows=400, row_shape=(16, 64))
    whole(unbroken)
    acknowledged: set[tuple[int, int]] = set()
    for lines in (1, 5, 20):
        driver = start(DRIVER, tmp_path / "killed")
        for _ in range(lines):
            said = driver.stdout.readline().split()
            if len(said) == 2:
                acknowledged.add((int(said[0]), int(said[1])))
        driver.send_signal(signal.SIGKILL)
        rest = driver.stdout.read().splitlines()
        acknowledged |= {(int(a), int(b)) for a, b in (line.split() for line in rest[:-1])}
        driver.wait()
        driver.stdout.close()
    assert len(acknowledged) >= 20
    with open_for_writing(spec, run_id="after") as run:
        assert not acknowledged & set(run.missing())
        assert run.recovery.rows_kept >= 4 * len(acknowledged)
        fill(run)
        run.seal()
    assert spec.path.read_bytes() == unbroken.path.read_bytes()
    assert spec.paths.index.read_bytes() == unbroken.paths.index.read_bytes()


WRITER = """
import pickle, sys
import numpy as np
from store_kit import sources_of
from raypipe.store import ShardWriter
target = pickle.loads(bytes.fromhex(sys.argv[1]))
with ShardWriter(target, "victim") as out:
    rows = np.ones((target.grid, *target.row_shape), np.float32)
    while True:
        for lo in range(0, target.rows, target.grid):
            out.write(lo, rows, sources_of(lo, lo + target.grid))
            print(lo, flush=True)
            if lo % (3 * target.grid) == 0:
                out.commit()
"""


def test_kill_9_of_a_writer_in_the_middle(tmp_path):
    import pickle

    spec = make_spec(tmp_path, rows=64, row_shape=(1 << 18,), grid=4)
    with open_for_writing(spec, run_id="r") as run:
        victim = start(WRITER, pickle.dumps(run.target).hex())
        for _ in range(6):
            victim.stdout.readline()
        time.sleep(0.003)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        victim.stdout.close()
        run.fence_writer("victim")
        run.refresh()
        kept = spec.rows - sum(hi - lo for lo, hi in run.missing())
        assert kept >= 16
        with ShardWriter(run.target, "heir") as out:
            for lo, hi in run.missing():
                out.write(
                    lo,
                    np.ones((hi - lo, 1 << 18), np.float32),
                    sources_of(lo, hi),
                    attempt=2,
                )
                out.commit()
        run.seal(verify=True)
    assert (np.load(spec.path, mmap_mode="r") == 1).all()


def test_committed_bytes_that_decayed_are_computed_again(tmp_path, unbroken):
    spec = make_spec(tmp_path)
    run = open_for_writing(spec, run_id="r")
    fill(run, bad=[5])
    abandon(run)
    raw = bytearray(spec.paths.partial.read_bytes())
    raw[128 + 4 * 60 + 3] ^= 1  # in row 4
    spec.paths.partial.write_bytes(raw)
    with open_for_writing(spec, run_id="r2") as run:
        assert run.missing() == [(4, 8)]
        assert run.recovery.rejected == ((4, 8),)
        fill(run, bad=[5])
        run.seal()
    assert_whole(spec, unbroken)


@pytest.mark.parametrize("size", [0, 10, 128, 300, 727])
def test_a_partial_file_that_was_cut(tmp_path, unbroken, size):
    spec = make_spec(tmp_path)
    run = open_for_writing(spec, run_id="r")
    fill(run, bad=[5])
    abandon(run)
    os.truncate(spec.paths.partial, size)
    attempt(spec, set())
    assert_whole(spec, unbroken)


def test_a_partial_file_that_is_gone(tmp_path, unbroken):
    spec = make_spec(tmp_path)
    run = open_for_writing(spec, run_id="r")
    fill(run, bad=[5])
    abandon(run)
    spec.paths.partial.unlink()
    attempt(spec, set())
    assert_whole(spec, unbroken)


def test_uncommitted_rows_do_not_count(tmp_path, unbroken):
    spec = make_spec(tmp_path)
    with open_for_writing(spec, run_id="r") as run, ShardWriter(run.target, "w") as out:
        out.write(0, rows_of(spec, 0, 10), sources_of(0, 10))
        with pytest.raises(StoreError, match=r"10 of 10 rows are not committed, first \[0, 4\)"):
            run.seal()
        out.commit()  # the refused seal left the fence open
        assert len(run.missing()) == 3
        run.refresh()
        assert run.missing() == []
    assert not spec.path.exists()
    with open_for_writing(spec, run_id="r2") as run:
        assert run.missing() == []
        run.seal()
    assert spec.path.read_bytes()[128:308] == unbroken[0][128:308]


def test_a_file_put_in_the_way_of_an_unfinished_store(tmp_path, unbroken):
    spec = make_spec(tmp_path)
    run = open_for_writing(spec, run_id="r")
    abandon(run)
    spec.path.write_bytes(b"somebody's own")
    with pytest.raises(StoreError, match="was put there while"):
        open_for_writing(spec, run_id="r")
    spec.paths.partial.unlink()
    with pytest.raises(StoreError, match="was put there while"):
        open_for_writing(spec, run_id="r")
    assert spec.path.read_bytes() == b"somebody's own"
    attempt(spec, set(), overwrite=True)
    assert_whole(spec, unbroken)


def test_sealed_store_whose_data_are_damaged(tmp_path, unbroken):
    spec = make_spec(tmp_path)
    whole(spec)
    os.truncate(spec.path, 100)
    with pytest.raises(StoreCorrupt, match="has 100 bytes, its manifest says 728"):
        open_for_writing(spec, run_id="r")
    attempt(spec, set(), overwrite=True)
    assert_whole(spec, unbroken)
    spec.paths.manifest.write_bytes(b"{")
    with pytest.raises(StoreCorrupt, match="is not JSON"):
        open_for_writing(spec, run_id="r")
    attempt(spec, set(), overwrite=True)
    assert_whole(spec, unbroken)
