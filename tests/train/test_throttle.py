"""Memory that runs short while training: fewer rows at once, the same steps, the same losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_helpers import (
    FakeGuard,
    SmallDeviceTask,
    StopAfter,
    ToyTask,
    config,
    grad_norms,
    losses,
    records,
    run,
)

from raypipe.errors import MemoryBudgetExceeded
from raypipe.memory.guard import guarding
from raypipe.stream import Cursor
from raypipe.train import load_model_state
from raypipe.train.feed import Micro, in_pieces


def same_run(ours: Path, plain: Path) -> None:
    for kind in ("step", "epoch"):
        assert losses(ours, kind) == pytest.approx(losses(plain, kind), rel=1e-5)
    assert grad_norms(ours) == pytest.approx(grad_norms(plain), rel=1e-4)
    states = [load_model_state(folder / "last") for folder in (ours, plain)]
    for name, weight in states[0].items():
        torch.testing.assert_close(weight, states[1][name], rtol=1e-4, atol=1e-5)


def micro_sizes(run_dir: Path) -> list[int | None]:
    return [r.get("micro_batch") for r in records(run_dir) if r["kind"] == "step"]


def counted_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each backward pass."""
    from raypipe.train.engine import Engine

    real, seen = Engine.backward, []

    def backward(self: Engine, micro: Micro, batch: Any) -> Any:
        seen.append(len(micro.rows))
        assert all(len(tensor) == len(micro.rows) for tensor in batch.values())
        return real(self, micro, batch)

    monkeypatch.setattr(Engine, "backward", backward)
    return seen


@pytest.mark.parametrize("split", [{"batch_size": 8}, {"batch_size": 4, "accumulate": 2}])
def test_pressure_halves_the_micro_batch_and_changes_no_number(
    toy: ToyTask, tmp_path: Path, split: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(toy, config(), tmp_path / "plain")
    seen = counted_rows(monkeypatch)
    said: list[str] = []
    full = split["batch_size"]
    with guarding(FakeGuard(2, 5)) as guard:
        run(toy, config(**split), tmp_path / "ours", say=said.append)
    same_run(tmp_path / "ours", tmp_path / "plain")
    assert micro_sizes(tmp_path / "ours") == [None] * 2 + [full // 2] * 3 + [full // 4] * 13
    before = 2 * 8 // full
    assert max(seen[:before]) == full
    assert max(seen[before : before + 3 * 16 // full]) == full // 2
    assert max(seen[before + 3 * 16 // full :]) == full // 4
    assert sum(seen) == 3 * 43
    assert guard.asked == 18
    assert guard.batches == [full, full // 2, full // 4]
    assert guard.phases == {"train", "validate", "save"}
    short = [text for text in said if "near its budget" in text]
    assert len(short) == 2
    assert f"at most {full // 2} rows from here on, instead of {full}" in short[0]


def test_lasting_pressure_ends_at_one_row(toy: ToyTask, tmp_path: Path) -> None:
    run(toy, config(), tmp_path / "plain")
    said: list[str] = []
    with guarding(FakeGuard(*range(100))) as guard:
        run(toy, config(), tmp_path / "ours", say=said.append)
    same_run(tmp_path / "ours", tmp_path / "plain")
    assert micro_sizes(tmp_path / "ours")[-1] == 1
    assert guard.batches == [8, 4, 2, 1]
    assert sum("near its budget" in text for text in said) == 3


def test_a_limit_already_in_force_holds_from_the_first_step(
    toy: ToyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(toy, config(), tmp_path / "plain")
    run(toy, config(), tmp_path / "ours", should_stop=StopAfter(4))
    seen = counted_rows(monkeypatch)
    with guarding(FakeGuard()) as guard:
        run(toy, config(), tmp_path / "ours", batch_limit=2)
    same_run(tmp_path / "ours", tmp_path / "plain")
    assert max(seen) == 2
    assert guard.batches == [2]
    run(toy, config(), tmp_path / "larger", batch_limit=100)
    assert set(micro_sizes(tmp_path / "larger")) == {None}


@pytest.mark.parametrize("where", ["forward", "backward", "validation"])
@pytest.mark.parametrize("split", [{"batch_size": 8}, {"batch_size": 4, "accumulate": 2}])
def test_a_device_out_of_memory_halves_and_computes_again(
    toy: ToyTask, tmp_path: Path, where: str, split: dict[str, int]
) -> None:
    run(toy, config(), tmp_path / "plain")
    said: list[str] = []
    small = SmallDeviceTask(toy.data, where=where, rows=2)
    with guarding(FakeGuard()) as guard:
        run(small, config(**split), tmp_path / "ours", say=said.append)
    same_run(tmp_path / "ours", tmp_path / "plain")
    halvings = {8: [8, 4, 2], 4: [4, 2]}[split["batch_size"]]
    assert guard.batches == halvings
    assert sum("ran out of memory (CUDA out of memory)" in text for text in said) == (
        len(halvings) - 1
    )


def test_a_failure_late_in_a_step_loses_and_repeats_no_gradient(
    toy: ToyTask, tmp_path: Path
) -> None:
    class Late(SmallDeviceTask):
        """Fails once, in the third micro batch of the second step, with half its gradients in."""

        def build_model(self) -> Any:
            model = super().build_model()
            calls = [0]

            def count(module: Any, args: Any) -> None:
                calls[0] += 1
                model.rows = 1 if calls[0] == 7 else 10**9

            model.register_forward_pre_hook(count)
            return model

    cfg = config(batch_size=2, accumulate=4)
    run(toy, cfg, tmp_path / "plain")
    run(Late(toy.data), cfg, tmp_path / "ours")
    same_run(tmp_path / "ours", tmp_path / "plain")
    assert micro_sizes(tmp_path / "ours") == [None] + [1] * 17


@pytest.mark.parametrize("where", ["forward", "backward", "validation"])
def test_one_row_that_is_too_much_is_refused(toy: ToyTask, tmp_path: Path, where: str) -> None:
    small = SmallDeviceTask(toy.data, where=where, rows=0)
    with pytest.raises(MemoryBudgetExceeded, match=r"one row at once.*--fit-gpu") as refused:
        run(small, config(), tmp_path / "run")
    assert refused.value.exit_code == 3


def test_an_optimiser_without_room_is_told_in_our_words(
    toy: ToyTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: Any, closure: Any = None) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried.")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(MemoryBudgetExceeded, match="in the optimiser's step"):
        run(toy, config(), tmp_path / "run")


def test_pieces_cover_the_micro_batch_and_the_last_one_is_last() -> None:
    batch = {"x": torch.arange(14).reshape(7, 2)}
    micro = Micro(Cursor(1, 2), 20, np.arange(10, 17), 7, True)
    parts = list(in_pieces(micro, batch, 3))
    assert [len(part.rows) for part, _ in parts] == [3, 2, 2]
    assert [part.last for part, _ in parts] == [False, False, True]
    assert sum(part.counted for part, _ in parts) == 7
    assert torch.equal(torch.cat([rows["x"] for _, rows in parts]), batch["x"])
    assert {(part.cursor, part.global_rows) for part, _ in parts} == {(Cursor(1, 2), 20)}
    assert parts[0][1]["x"].data_ptr() == batch["x"].data_ptr()  # a view, no copy
    idle = replace(micro, rows=np.arange(1), counted=0)
    assert [part.counted for part, _ in in_pieces(idle, {"x": batch["x"][:1]}, 3)] == [0]
