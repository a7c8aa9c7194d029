"""Which failure of a training's workers ends it at once; the errors are Ray Train's, without its workers."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
)

from raypipe.cluster import failures
from raypipe.cluster.budget import WorkerMemory
from raypipe.cluster.failures import NoSecondTry, batch_limit
from raypipe.errors import MemoryBudgetExceeded, WorkerFailed
from raypipe.memory.config import resolve
from raypipe.memory.verdict import Verdict

DEATH = {1: WorkerHealthCheckFailedError("a worker is gone", ActorDiedError())}
ENDED = Verdict(
    pid=1, start_ticks=1, host="box", label="mine", budget_bytes=2 << 30, stop_bytes=7 << 28,
    usage_bytes=7 << 28, anon_bytes=7 << 28, pinned_bytes=0, shm_bytes=0, file_bytes=0, batch=8,
    phase="train", tried=(), unseen_s=0.01, when=1.0,
)  # fmt: skip


@pytest.fixture
def memory(tmp_path: Path) -> WorkerMemory:
    return WorkerMemory(memory=resolve(environ={}), per_node=1, run_dir=tmp_path)


def told(memory: WorkerMemory, *verdicts: Verdict) -> NoSecondTry:
    for verdict in verdicts:
        assert memory.verdict_dir
        verdict.write(memory.verdict_dir)
    return NoSecondTry(memory, "mine")


def test_an_error_of_ours_is_final_and_any_other_is_not(memory: WorkerMemory) -> None:
    callback = told(memory, replace(ENDED, batch=1))
    theirs = {0: UserExceptionWithTraceback(RuntimeError("anew"), "")}
    callback.after_exception(None, theirs)  # nobody died: no verdict is looked for
    ours = UserExceptionWithTraceback(WorkerFailed("the loss is nan"), "")
    ours.__cause__ = WorkerFailed("the loss is nan")
    with pytest.raises(WorkerFailed, match="the loss is nan"):
        callback.after_exception(None, theirs | {3: ours})


@pytest.mark.parametrize("batch", [1, None])
def test_a_death_that_no_smaller_batch_could_have_spared_is_final(
    memory: WorkerMemory, batch: int | None
) -> None:
    verdict = replace(ENDED, batch=batch)
    with pytest.raises(MemoryBudgetExceeded, match=r"was stopped.*of its budget of 2\.00 GiB"):
        told(memory, verdict).after_exception(None, DEATH)


def test_other_deaths_are_tried_again(memory: WorkerMemory) -> None:
    callback = told(memory, ENDED, replace(ENDED, pid=2, label="another call's", batch=1))
    callback.after_exception(None, DEATH)
    callback.after_exception(None, DEATH)  # the second left no verdict
    with pytest.raises(MemoryBudgetExceeded):
        told(memory, replace(ENDED, pid=3, batch=1)).after_exception(None, DEATH)


def test_a_verdict_that_comes_a_moment_later_is_waited_for(
    memory: WorkerMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "VERDICT_WAIT_S", 20.0)
    callback = told(memory)
    late = threading.Timer(0.2, told, (memory, replace(ENDED, batch=1)))
    late.start()
    began = time.monotonic()
    with pytest.raises(MemoryBudgetExceeded):
        callback.after_exception(None, DEATH)
    assert time.monotonic() - began < 10
    late.join()


def test_the_limit_is_half_the_smallest_batch() -> None:
    assert batch_limit([]) is None
    assert batch_limit([ENDED]) == 4
    assert batch_limit([ENDED, replace(ENDED, batch=4), ENDED]) == 2


def test_a_folder_that_cannot_be_read_ends_no_training(
    memory: WorkerMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network disk whose server comes back: the workers that begin anew look again."""

    def stale(*_: object) -> None:
        raise OSError(116, "Stale file handle")

    callback = told(memory, replace(ENDED, batch=1))
    with monkeypatch.context() as patched:
        patched.setattr(failures, "verdicts", stale)
        callback.after_exception(None, DEATH)
    with pytest.raises(MemoryBudgetExceeded):
        callback.after_exception(None, DEATH)
