"""What is saved where memory ends a fit, by where it ends; and that the run that goes on is the unbroken one.

Devices without memory are made up: torch's error is raised where a device would raise it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import LateTask, ToyTask, config, run, same_run, saved_steps

from raypipe.errors import MemoryBudgetExceeded
from raypipe.train import checkpoint, loop
from raypipe.train.engine import Engine
from raypipe.train.metrics import MetricsLog
from raypipe.train.saving import Saver

FULL = "CUDA out of memory. Tried to allocate 2 MiB. Advice."
STEPS = 6  # an epoch


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("room_for", [0, 1, 2])
def test_a_run_goes_on_with_the_validation_that_it_owes(
    noisy: ToyTask, tmp_path: Path, room_for: int, ema: float | None
) -> None:
    """room_for 2: all steps are done, and the run is not over."""
    late = LateTask(noisy.data, dropout=noisy.dropout, room_for=room_for, where="validation")
    cfg, ours = config(ema_decay=ema), tmp_path / "run"
    with pytest.raises(MemoryBudgetExceeded, match="one row at once is too many") as ended:
        run(late, cfg, ours)
    assert ended.value.exit_code == 3
    found = checkpoint.newest(ours)
    assert found is not None and not found.meta["judged"]
    at = found.meta["progress"]
    assert (at["epoch"], at["step"], at["owes_validation"]) == (room_for + 1, 0, True)
    assert at["global_step"] == STEPS * (room_for + 1) and len(at["history"]) == room_for
    assert (ours / "best").exists() == (room_for > 0)
    said: list[str] = []
    assert run(noisy, cfg, ours, say=said.append).epochs == 3
    assert f"epoch {room_for + 1} step 0, once epoch {room_for} is validated" in said[0]
    run(noisy, cfg, tmp_path / "whole")
    same_run(ours, tmp_path / "whole")


def goes_on_as_unbroken(task: ToyTask, tmp_path: Path) -> None:
    """What was rescued in ``run`` ends as a run does that nothing befell."""
    run(task, config(), tmp_path / "run")
    run(task, config(), tmp_path / "whole")
    same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("room_for", [1, 9, 12])
def test_dropout_after_a_rescue_is_that_of_the_unbroken_run(
    noisy: ToyTask, tmp_path: Path, room_for: int
) -> None:
    """The step that failed had drawn from the generators, four times."""
    late = LateTask(noisy.data, dropout=noisy.dropout, room_for=room_for)
    ours = tmp_path / "run"
    with pytest.raises(MemoryBudgetExceeded, match="one row at once"):
        run(late, config(), ours)
    assert saved_steps(ours) == room_for
    goes_on_as_unbroken(noisy, tmp_path)


def fail_at(monkeypatch: pytest.MonkeyPatch, n: int, *, moved: bool) -> None:
    """AdamW's n-th step has no room; ``moved``: after the first weight was changed."""
    real, calls = torch.optim.AdamW.step, []

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) < n:
            return real(self, *args, **kwargs)
        if moved:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1.0)
        raise torch.OutOfMemoryError(FULL)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


@pytest.mark.parametrize("moved", [True, False])
def test_half_an_update_is_not_saved(
    noisy: ToyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    """Nobody can say whether a step that failed had begun: the checkpoint before it is what stands."""
    cfg, ours = config(checkpoint_every_steps=4), tmp_path / "run"
    with monkeypatch.context() as patched:
        fail_at(patched, 11, moved=moved)
        said = r"half new and are not saved; resume from \S*/last, of 8 steps \(2 less"
        with pytest.raises(MemoryBudgetExceeded, match=said) as ended:
            run(noisy, cfg, ours)
    assert ended.value.exit_code == 3 and "\n" not in str(ended.value)
    assert saved_steps(ours) == 8
    run(noisy, cfg, ours)
    run(noisy, cfg, tmp_path / "whole")
    same_run(ours, tmp_path / "whole")


def test_half_an_update_before_the_first_checkpoint_leaves_none(
    noisy: ToyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, 3, moved=True)
    with pytest.raises(MemoryBudgetExceeded, match="there is no checkpoint yet"):
        run(noisy, config(), tmp_path / "run")
    assert saved_steps(tmp_path / "run") is None


def fails_after(n: int, real: Any) -> Any:
    """``real``, whose calls after the n-th find no room."""
    calls: list[int] = []

    def late(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > n:
            raise torch.OutOfMemoryError(FULL)
        return real(*args, **kwargs)

    return late


@pytest.mark.parametrize("done", [4, STEPS])
@pytest.mark.parametrize("where", ["the gradients' norm", "the next batch"])
def test_weights_that_no_update_has_touched_are_saved(
    noisy: ToyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, done: int
) -> None:
    ours = tmp_path / "run"
    with monkeypatch.context() as patched:
        if where == "the next batch":
            patched.setattr(loop, "check_place", fails_after(done, loop.check_place))
        else:
            clip = torch.nn.utils.clip_grad_norm_
            patched.setattr(torch.nn.utils, "clip_grad_norm_", fails_after(done, clip))
        with pytest.raises(MemoryBudgetExceeded, match="ran out of memory"):
            run(noisy, config(), ours)
    assert saved_steps(ours) == done
    goes_on_as_unbroken(noisy, tmp_path)


@pytest.mark.parametrize("full", ["training_state", "judged_state"])
def test_a_last_names_no_best_that_is_not_there(
    noisy: ToyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    """No room while the second epoch, which is better than the first, is saved."""
    ours, saves = tmp_path / "run", []
    whole = run(noisy, config(epochs=2), tmp_path / "whole")
    real_save, real = Saver.save, getattr(Engine, full)

    def save(self: Saver, *, best: bool) -> None:
        saves.append(best)
        real_save(self, best=best)

    def late(self: Engine, *, alone: bool = False) -> Any:
        if len(saves) == 2 and not alone:
            raise torch.OutOfMemoryError(FULL)
        return real(self, alone=alone) if full == "training_state" else real(self)

    with monkeypatch.context() as patched:
        patched.setattr(Saver, "save", save)
        patched.setattr(Engine, full, late)
        with pytest.raises(MemoryBudgetExceeded, match="ran out of memory"):
            run(noisy, config(), ours)
    assert saves == [True, True] and whole.best_epoch == 1
    last, best = (checkpoint.newest(ours, name) for name in ("last", "best"))
    assert last is not None and best is not None
    named = [found.meta["progress"]["best_epoch"] for found in (last, best)]
    assert named == [0, 0] and saved_steps(ours) == STEPS
    goes_on_as_unbroken(noisy, tmp_path)


def test_a_rank_that_does_not_write_the_log_knows_what_is_in_it(tmp_path: Path) -> None:
    """Steps 0 and 1 and the epoch after them are there, step 3 is torn: 2 and 3 come from the rank."""

    def step(n: int) -> dict[str, Any]:
        return {"kind": "step", "global_step": n, "loss": float(n)}

    epoch, path = {"kind": "epoch", "global_step": 2}, tmp_path / "metrics.jsonl"
    records = [step(0), step(1), epoch, step(2), step(3)]
    silent = MetricsLog(None, 0)
    for record in records:
        silent.append(record)
    for n_there in range(len(records) + 1):
        whole = "".join(json.dumps(record) + "\n" for record in records[:n_there])
        path.write_text(whole + '{"kind": "st')
        assert silent.beside(path) == (len(whole), records[n_there:])
    with MetricsLog(path, 0, records[3:]):
        pass
    assert [json.loads(line) for line in path.read_text().splitlines()] == records
    path.unlink()
    assert silent.beside(path) == (0, records)


def test_a_rank_that_saw_an_old_log_cuts_nothing_older_than_its_records(tmp_path: Path) -> None:
    """Of 100 steps in tens it saw those up to step 69; another wrote three steps more."""
    path, stale = tmp_path / "metrics.jsonl", tmp_path / "stale.jsonl"
    silent, wrote = MetricsLog(None, 0), MetricsLog(path, 0)
    for n in range(103):
        ended = [{"kind": "epoch", "global_step": n}] if n and n % 10 == 0 else []
        for record in [*ended, {"kind": "step", "global_step": n}]:
            wrote.append(record)
            if n < 100:
                silent.append(record)
        if n == 69:
            stale.write_bytes(path.read_bytes())
    with wrote:
        whole = path.read_text().splitlines()
    length, tail = silent.beside(stale)
    assert length == stale.stat().st_size and tail[0]["global_step"] > 70
    for _ in range(2):  # the same checkpoint may be resumed twice
        with MetricsLog(path, length, tail):
            pass
        assert path.read_text().splitlines() == whole[:-4]


@pytest.mark.parametrize("torn", [b"\0\0\n", b'{"kind": "step", "global_step": 5}'])
def test_a_torn_line_ends_what_is_kept(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    steps = [{"kind": "step", "global_step": n} for n in range(9)]
    lines = [json.dumps(step).encode() + b"\n" for step in steps]
    after = lines[6:] if torn.endswith(b"\n") else []
    path.write_bytes(b"".join([*lines[:5], torn, *after]))
    with MetricsLog(path, len(b"".join(lines[:2])), steps[7:]):
        pass
    assert path.read_bytes() == b"".join([*lines[:5], *lines[7:]])
