"""One run owns a store; writers that were given up on never touch it again.

What a writer in its rights may do is test_store_writers'.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time

import numpy as np
import pytest
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

from raypipe.errors import Fenced, StoreError, StoreLocked
from raypipe.store import ShardWriter, discard_store, open_for_writing
from raypipe.store import fence as fence_module
from raypipe.store.fence import Fence, FenceState
from raypipe.store.flocks import Flock
from raypipe.store.lock import Owner, take_lock

HOLDER = """
import sys, time
from store_kit import make_spec
from raypipe.store import open_for_writing
with open_for_writing(make_spec(sys.argv[1]), run_id="first-run"):
    print("open", flush=True)
    time.sleep(60)
"""


def test_a_second_run_fails_at_once_and_names_the_owner(tmp_path):
    spec = make_spec(tmp_path)
    holder = start(HOLDER, tmp_path)
    assert holder.stdout.readline() == "open\n"
    began = time.monotonic()
    with pytest.raises(StoreLocked) as caught:
        open_for_writing(spec, run_id="second")
    assert time.monotonic() - began < 1
    text = str(caught.value)
    assert f"pid {holder.pid} on {os.uname().nodename}" in text
    assert "run first-run" in text
    assert "\n" not in text.replace(HOLDER, "")
    with pytest.raises(StoreLocked):
        discard_store(spec.path)
    holder.send_signal(signal.SIGKILL)  # leaves no stale lock
    holder.wait()
    holder.stdout.close()
    whole(spec)
    assert beside(spec) == SEALED_FILES


def test_a_second_run_in_the_same_process_too(tmp_path):
    spec = make_spec(tmp_path)
    with open_for_writing(spec, run_id="a"), pytest.raises(StoreLocked, match="run a"):
        open_for_writing(spec, run_id="b")
    with open_for_writing(spec, run_id="b") as run:
        assert run.epoch == 2


def test_many_at_once_one_wins(tmp_path):
    spec = make_spec(tmp_path)
    barrier, outcomes = threading.Barrier(8), []

    def contend(name):
        barrier.wait()
        try:
            with open_for_writing(spec, run_id=name) as run:
                if not run.sealed:
                    fill(run)
                    run.seal()
                outcomes.append("sealed" if run.recovery.rows_kept == 10 else "wrote")
        except StoreLocked:
            outcomes.append("locked")

    threads = [threading.Thread(target=contend, args=(f"run-{k}",)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("wrote") == 1
    assert len(outcomes) == 8
    assert beside(spec) == SEALED_FILES


def test_a_lock_file_that_was_removed_as_we_opened_it(tmp_path, monkeypatch):
    """Sealing removes the lock file: who locks the removed one would own a store with another."""
    spec = make_spec(tmp_path)
    spec.path.parent.mkdir(parents=True)
    real, calls = Flock.try_exclusive, []

    def seal_just_now(lock):
        calls.append(lock)
        if len(calls) == 1:
            spec.paths.lock.unlink()
        return real(lock)

    monkeypatch.setattr(Flock, "try_exclusive", seal_just_now)
    lock = take_lock(spec.paths)
    assert len(calls) == 2
    assert os.path.samestat(os.fstat(lock.fd), spec.paths.lock.stat())
    lock.close()


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    spec = make_spec(tmp_path)
    run = open_for_writing(spec, run_id="parent")
    out = ShardWriter(run.target, "w")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            out.write(0, rows_of(spec, 0, 4), sources_of(0, 4))
            os.write(writer, b"written")
        except StoreError:
            os.write(writer, b"refused")
        time.sleep(60)
        os._exit(0)
    assert os.read(reader, 7) == b"refused"
    out.close()
    abandon(run)
    try:
        with open_for_writing(spec, run_id="next"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


def test_owner_record(tmp_path):
    owner = Owner.me("r", 3)
    owner.write(tmp_path / "o.json")
    assert Owner.read(tmp_path / "o.json") == owner
    assert owner.alive is True
    owner.release(tmp_path / "o.json")
    assert Owner.read(tmp_path / "o.json").alive is False
    from dataclasses import replace

    assert replace(owner, host="elsewhere").alive is None
    assert replace(owner, process_started=1.0).alive is False  # the pid was given out again
    (tmp_path / "o.json").write_text("{}")
    assert Owner.read(tmp_path / "o.json") is None
    assert Owner.read(tmp_path / "nothing") is None


def test_a_zombie_of_a_past_run_cannot_write_or_commit(tmp_path):
    spec = make_spec(tmp_path)
    old = open_for_writing(spec, run_id="old")
    zombie, late = ShardWriter(old.target, "zombie"), old.target
    zombie.write(0, rows_of(spec, 0, 4) + 1, sources_of(0, 4))  # other bytes, not committed
    zombie.write(4, rows_of(spec, 4, 8), sources_of(4, 8))
    abandon(old)
    with open_for_writing(spec, run_id="new") as run:
        assert run.epoch == 2
        assert len(run.missing()) == 3
        fill(run)
        partial = spec.paths.partial.read_bytes()
        with pytest.raises(Fenced, match="epoch 1 was superseded by 2; it must stop"):
            zombie.commit()
        with pytest.raises(Fenced):
            zombie.write(0, rows_of(spec, 0, 4) + 2, sources_of(0, 4))
        with pytest.raises(Fenced), ShardWriter(late, "late") as out:
            out.write(0, rows_of(spec, 0, 4) + 2, sources_of(0, 4))
        assert spec.paths.partial.read_bytes() == partial
        assert not any("zombie" in p.name for p in spec.paths.journals())
        run.seal(verify=True)
    for attempt in (zombie.commit, lambda: zombie.write(0, rows_of(spec, 0, 4), sources_of(0, 4))):
        with pytest.raises(Fenced):
            attempt()
    with pytest.raises(Fenced, match="was sealed or replaced"):
        ShardWriter(late, "later")
    zombie.close()
    np.testing.assert_array_equal(np.load(spec.path), rows_of(spec, 0, 10))


def test_a_zombie_that_slept_through_removal_and_a_new_store(tmp_path):
    """Epochs begin again at 1 after a removal; the token tells the runs apart."""
    spec = make_spec(tmp_path)
    old = open_for_writing(spec, run_id="old")
    target = old.target
    zombie = ShardWriter(target, "zombie")
    abandon(old)
    discard_store(spec.path)
    with open_for_writing(spec, run_id="new") as run:
        assert run.epoch == target.epoch == 1
        with pytest.raises(Fenced):
            zombie.write(0, rows_of(spec, 0, 4), sources_of(0, 4))
        with pytest.raises(Fenced), ShardWriter(target, "late") as out:
            out.write(0, rows_of(spec, 0, 4), sources_of(0, 4))
    zombie.close()


def test_sealing_shuts_out_this_runs_own_writers(tmp_path):
    spec = make_spec(tmp_path)
    with open_for_writing(spec, run_id="r") as run:
        straggler = ShardWriter(run.target, "straggler")
        straggler.write(0, rows_of(spec, 0, 4), sources_of(0, 4))
        fill(run)
        run.seal()
        before = spec.path.read_bytes()
        with pytest.raises(Fenced, match="is being sealed"):
            straggler.write(0, rows_of(spec, 0, 4) + 1, sources_of(0, 4))
        with pytest.raises(Fenced, match="is being sealed"):
            straggler.commit()
        straggler.close()
    assert spec.path.read_bytes() == before


def test_a_single_writer_is_given_up(tmp_path):
    spec = make_spec(tmp_path)
    with open_for_writing(spec, run_id="r") as run:
        lost, heir = ShardWriter(run.target, "lost"), ShardWriter(run.target, "heir")
        lost.write(0, rows_of(spec, 0, 4), sources_of(0, 4))
        lost.commit()
        lost.write(4, rows_of(spec, 4, 8), sources_of(4, 8))
        run.fence_writer("lost")
        with pytest.raises(Fenced, match="gave this writer up"):
            lost.commit()
        run.refresh()
        assert run.missing() == [(4, 8), (8, 10)]
        heir.write(4, rows_of(spec, 4, 10), sources_of(4, 10), attempt=2)
        run.accept(heir.commit())
        assert run.missing() == []
        run.seal()
        lost.close()
        heir.close()


STUCK = """
import os, pickle, signal, sys
from store_kit import rows_of, make_spec, sources_of
from raypipe.store import ShardWriter
target, spec = pickle.loads(bytes.fromhex(sys.argv[1])), make_spec(sys.argv[2])
out, pwrite = ShardWriter(target, "stuck"), os.pwrite
def stop(*args):
    print("inside", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    return pwrite(*args)
os.pwrite = stop
out.write(0, rows_of(spec, 0, 4) + 1, sources_of(0, 4))
print("wrote", flush=True)
"""


def test_a_writer_stopped_inside_a_write_holds_the_new_run_up(tmp_path, monkeypatch):
    """Between its check and its write lies no gap: the new run waits, then names the process."""
    spec = make_spec(tmp_path)
    old = open_for_writing(spec, run_id="old")
    stuck = start(STUCK, pickle.dumps(old.target).hex(), tmp_path)
    assert stuck.stdout.readline() == "inside\n"
    abandon(old)
    monkeypatch.setattr(fence_module, "_BARRIER_S", 0.2)
    with pytest.raises(StoreLocked, match=rf"a writer \(pid {stuck.pid}\) has been inside a write"):
        open_for_writing(spec, run_id="new")
    monkeypatch.setattr(fence_module, "_BARRIER_S", 20.0)
    threading.Timer(0.2, lambda: stuck.send_signal(signal.SIGCONT)).start()
    with open_for_writing(spec, run_id="new") as run:  # got in once the write was over
        assert stuck.stdout.readline() == "wrote\n"
        fill(run)
        run.seal(verify=True)
    stuck.wait()
    stuck.stdout.close()
    np.testing.assert_array_equal(np.load(spec.path), rows_of(spec, 0, 10))


def test_fence_states():
    state = FenceState(3, "t", fenced=("a",))
    assert state.refuses(3, "t", "b") is None
    assert "given up" in state.refuses(3, "t", "a") or "gave" in state.refuses(3, "t", "a")
    assert "superseded" in state.refuses(2, "t", "b")
    assert "superseded" in state.refuses(3, "u", "b")
    assert "sealed" in FenceState(3, "t", closed=True).refuses(3, "t", "b")


def test_a_torn_fence_lets_nobody_pass(tmp_path):
    path = tmp_path / "fence"
    fence = Fence(path, create=True)
    assert fence.read() is None
    with pytest.raises(Fenced, match="cannot be read"), fence.passing(1, "t", "w"):
        pass
    fence.raise_to(FenceState(1, "t", fenced=tuple(f"w{k}" for k in range(5000))))
    fence.raise_to(FenceState(2, "t"))  # shorter: nothing of the longer one is read
    assert fence.read() == FenceState(2, "t")
    raw = path.read_bytes()
    path.write_bytes(b"x" + raw[1:])
    with pytest.raises(Fenced), fence.passing(2, "t", "w"):
        pass
    fence.close()
    with pytest.raises(FileNotFoundError):
        Fence(tmp_path / "none")


def test_epoch_grows_whatever_was_lost(tmp_path):
    spec = make_spec(tmp_path)
    for epoch, lose in enumerate((None, spec.paths.owner, spec.paths.fence), start=1):
        if lose:
            lose.unlink()
        run = open_for_writing(spec, run_id="r")
        assert run.epoch == epoch
        abandon(run)
    whole(spec)
    other = make_spec(tmp_path, grid=5)
    with open_for_writing(other, run_id="r", overwrite=True) as run:
        assert run.epoch == 5
