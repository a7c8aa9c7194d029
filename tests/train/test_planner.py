"""The memory planner: its table, and what it chooses under a budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from image_tasks import ImageTask
from train_helpers import SmallDeviceTask, ToyTask, config, made_up

from raypipe.errors import ConfigError, MemoryBudgetExceeded
from raypipe.train import TrainConfig
from raypipe.train.planner import predict

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_each_technique_takes_less_of_what_it_is_for(images: Path) -> None:
    plan = predict(ImageTask(images, "conv"), config(batch_size=60), CPU)
    peak = {p.techniques.name: plan.peak_bytes(p, 60) for p in plan.predictions}
    assert list(peak) == [
        "fp32",
        "channels_last",
        "checkpointing",
        "AMP bf16",
        "AMP bf16 + checkpointing + channels_last",
    ]
    assert peak["checkpointing"] < 0.8 * peak["fp32"]
    assert peak["AMP bf16"] < 0.8 * peak["fp32"]
    assert min(peak, key=peak.__getitem__) == "AMP bf16 + checkpointing + channels_last"


def test_what_a_model_cannot_do_is_shown_as_such(toy: ToyTask) -> None:
    lines = predict(toy, config(), CPU).lines()
    assert "measured at 2 and 3 rows on cpu" in lines[0]
    assert "peak at 8" in lines[1]
    assert lines[2].startswith("  fp32 ") and lines[2].endswith("<-")
    assert any(
        line.startswith("  channels_last ") and "no 2-D convolutions" in line for line in lines
    )
    conv = predict(replace(toy, conv=True), config(channels_last=True), CPU).lines()
    assert any("no blocks to recompute" in line for line in conv)
    assert [line.split()[0] for line in conv if line.endswith("<-")] == ["channels_last"]
    # What is asked for in vain is marked where it really is.
    vain = predict(toy, config(channels_last=True), CPU).lines()
    assert [line.split()[0] for line in vain if line.endswith("<-")] == ["fp32"]


def test_techniques_asked_for_are_measured_together_with_the_others(toy: ToyTask) -> None:
    plan = predict(toy, config(amp="fp16"), CPU)
    names = [p.techniques.name for p in plan.predictions if p.footprint]
    assert names == ["fp32", "AMP fp16", "checkpointing", "AMP fp16 + checkpointing"]
    assert [line.split()[:2] for line in plan.lines() if line.endswith("<-")] == [["AMP", "fp16"]]


def test_a_device_that_cannot_hold_the_small_batch_is_said_so(toy: ToyTask) -> None:
    plan = predict(SmallDeviceTask(toy.data, rows=1, where="forward"), config(), CPU)
    assert all(p.footprint is None for p in plan.predictions)
    assert any("cannot hold 3 rows" in line for line in plan.lines())
    with pytest.raises(MemoryBudgetExceeded, match="cannot hold 2 rows"):
        plan.choose(1 << 30)


def test_measuring_leaves_the_generators_alone(toy: ToyTask) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1).item()
    torch.manual_seed(3)
    predict(replace(toy, dropout=0.5), config(), CPU)
    assert torch.rand(1).item() == expected


@pytest.mark.parametrize(
    ("budget", "name", "batch", "accumulate", "peak"),
    [
        (1000, "fp32", 16, 1, 260),
        (260, "fp32", 16, 1, 260),
        (259, "checkpointing", 16, 1, 184),
        (184, "checkpointing", 16, 1, 184),
        (183, "AMP bf16 + checkpointing + channels_last", 16, 1, 132),
        (132, "AMP bf16 + checkpointing + channels_last", 16, 1, 132),
        (131, "AMP bf16 + checkpointing + channels_last", 8, 2, 121),
        (107, "AMP bf16", 2, 8, 107),
        (106, "AMP bf16", 1, 16, 101),
        (101, "AMP bf16", 1, 16, 101),
    ],
)
def test_the_mildest_set_that_holds_the_most_rows(
    budget: int, name: str, batch: int, accumulate: int, peak: int
) -> None:
    choice = made_up(batch_size=16).choose(budget)
    assert (choice.name, choice.cfg.batch_size, choice.cfg.accumulate, choice.peak_bytes) == (
        name,
        batch,
        accumulate,
        peak,
    )
    assert choice.peak_bytes <= budget
    assert choice.cfg.rows_per_step(1) == 16


def test_room_is_used_for_larger_micro_batches_of_the_same_step() -> None:
    choice = made_up(batch_size=6, accumulate=4).choose(225)
    assert (choice.name, choice.cfg.batch_size, choice.cfg.accumulate) == ("fp32", 12, 2)
    assert made_up(batch_size=6, accumulate=4).choose(10_000).cfg.batch_size == 24


def test_several_workers_keep_their_gradient_buckets() -> None:
    assert made_up(batch_size=16).choose(260).peak_bytes == 260
    assert made_up(2, batch_size=16).choose(265).peak_bytes == 265
    assert made_up(2, batch_size=16).choose(264).name == "checkpointing"


def test_what_was_asked_for_is_kept() -> None:
    assert made_up(batch_size=16, amp="bf16").choose(1000).name == "AMP bf16"
    asked = made_up(batch_size=16, channels_last=True)
    assert asked.choose(1000).name == "channels_last"
    assert asked.choose(200).name == "AMP bf16 + checkpointing + channels_last"
    assert made_up(batch_size=16).choose(183, amp="off").cfg.batch_size == 8
    with pytest.raises(MemoryBudgetExceeded):
        made_up(batch_size=16).choose(110, amp="off")


def test_nothing_that_fits_is_refused_with_need_and_remedy() -> None:
    with pytest.raises(MemoryBudgetExceeded) as refused:
        made_up(batch_size=16).choose(100)
    assert refused.value.exit_code == 3
    for part in ("--fit-gpu 100 B", "101 B (AMP bf16)", "give a budget of at least that"):
        assert part in str(refused.value)


def test_a_budget_is_a_size() -> None:
    assert TrainConfig(fit_gpu="12GiB").fit_gpu_bytes == 12 << 30
    for wrong in ("12 apples", "0GiB"):
        with pytest.raises(ConfigError):
            TrainConfig(fit_gpu=wrong)
