"""A training step on the U-Net: accumulation, memory format and recomputation change no numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from unet_bench import unet_memory

from raypipe.segment.model import UNetConfig, build_model
from raypipe.stream import Cursor
from raypipe.train import TrainConfig, WorkerContext
from raypipe.train.engine import Engine
from raypipe.train.feed import Micro
from raypipe.train.footprint import measure

B, SIDE = 6, 16
SPEC = UNetConfig(width=4, depth=3)


def task(folder: Path = Path()) -> Any:
    """One foreground on the images and masks in ``folder``."""
    return unet_memory().UNetTask(folder, SPEC, B)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(B, 1, SIDE, SIDE, generator=generator)
    return {"image": image, "mask": (image[:, 0] > 0.3).byte()}


def step(
    sizes: Sequence[int], *, freeze: bool = False, **options: Any
) -> tuple[float, list[Tensor]]:
    """The loss's sum and the gradients of one step over B images in micro batches of ``sizes``."""
    cfg = TrainConfig(**options)
    engine = Engine(task(), cfg, WorkerContext(run_dir=Path()))
    engine.module.train()
    if freeze:
        for part in engine.module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
    total, lo = 0.0, 0
    for size in sizes:
        rows = np.arange(lo, lo + size)
        piece = {name: tensor[lo : lo + size] for name, tensor in batch().items()}
        lo += size
        total += float(engine.backward(Micro(Cursor(), B, rows, size, lo == B), piece))
    grads = [p.grad.clone() for p in engine.module.parameters() if p.grad is not None]
    return total, grads


def by_plain_loop(*, freeze: bool) -> tuple[float, list[Tensor]]:
    """The same by torch alone: the mean loss of the images, each computed by itself if frozen."""
    model = build_model(SPEC).train()
    images = batch()
    if freeze:
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
        parts = [{name: t[i : i + 1] for name, t in images.items()} for i in range(B)]
    else:
        parts = [images]
    total = torch.zeros(())
    for part in parts:
        z, t = model(part["image"])[:, 0], part["mask"].float()
        p = torch.sigmoid(z)
        bce = -(t * p.log() + (1 - t) * (1 - p).log()).mean((1, 2))
        dice = 1 - (2 * (p * t).sum((1, 2)) + 1) / (p.sum((1, 2)) + t.sum((1, 2)) + 1)
        total = total + (0.5 * bce + 0.5 * dice).sum()
    (total / B).backward()
    return float(total.detach()), [p.grad for p in model.parameters() if p.grad is not None]


def check(found: tuple[float, list[Tensor]], expected: tuple[float, list[Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert len(found[1]) == len(expected[1])
    for a, b in zip(found[1], expected[1], strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=2e-6)


def test_a_step_equals_a_plain_loop() -> None:
    check(step([B]), by_plain_loop(freeze=False))


@pytest.mark.parametrize("sizes", [[3, 3], [1] * B, [4, 2]])
def test_accumulation_equals_the_big_batch_with_frozen_norms(sizes: list[int]) -> None:
    check(step(sizes, freeze=True), step([B], freeze=True))
    check(step(sizes, freeze=True), by_plain_loop(freeze=True))


def test_with_moving_norms_it_does_not() -> None:
    """So the test above shows something."""
    whole, parts = step([B]), step([1] * B)
    assert parts[0] != pytest.approx(whole[0], rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"checkpointing": True},
        {"checkpointing": True, "use_reentrant": True},
        {"channels_last": True},
        {"channels_last": True, "checkpointing": True},
    ],
)
def test_a_technique_that_only_saves_memory_changes_no_numbers(options: dict[str, Any]) -> None:
    check(step([B], **options), step([B]))


def test_what_is_kept_is_what_the_drawing_says() -> None:
    """Bytes that torch saves, against a sum over the levels by hand."""
    model = build_model(SPEC, 0).train()
    saved = unet_memory().SavedBytes([*model.parameters(), *model.buffers()])
    x = torch.randn(2, 1, SIDE, SIDE)
    with saved.hooks():
        model(x)
    expected = x.nbytes
    for level in range(SPEC.depth):
        channels, side = SPEC.channels(level), SIDE // 2**level
        values = 2 * channels * side**2  # of one map, all images
        norms = 2 * 2 * channels * 4  # mean and 1/std of two norms
        expected += 4 * 4 * values + norms  # two convolutions: norm's input, ReLU's output
        if level < SPEC.depth - 1:
            # Way up: the same, and the joined map of twice the channels.
            expected += 4 * 4 * values + norms + 4 * 2 * values
        if level > 0:  # pooling: the places of its maxima, and the map it gave
            pooled = 2 * SPEC.channels(level - 1) * side**2
            expected += 8 * pooled + 4 * pooled
    assert saved.n_bytes == expected


def test_the_benchmark_counts_as_torchs_hooks_do() -> None:
    bench = unet_memory()
    sets = bench.SETS.items()
    found = {name: bench.count((4, 64, 64), options, SPEC) for name, options in sets}
    assert found["fp32"].kept == pytest.approx(found["fp32"].hooks, rel=1e-3)
    assert found["ckpt"].kept < 0.5 * found["fp32"].kept
    assert found["all"].peak < found["fp32"].peak


@pytest.mark.parametrize("name", ["fp32", "all"])
def test_the_planner_foretells_the_count_of_a_larger_batch(name: str, tmp_path: Path) -> None:
    """From 2 and 3 rows, against a step of 24."""
    for key, tensor in batch().items():
        np.save(tmp_path / f"{key}.npy", tensor.numpy())
    bench, options = unet_memory(), unet_memory().SETS[name]
    planned = measure(task(tmp_path), TrainConfig(**options), torch.device("cpu"))
    training = {k: v for k, v in planned.phases.items() if k != "validate"}
    alone = replace(planned, phases=training, batch_row_bytes=0)
    given = 24 * (4 + 1) * SIDE**2  # the images and masks, which the plan counts elsewhere
    counted = bench.count((24, SIDE, SIDE), options, SPEC).peak - given
    assert alone.peak_bytes(24, accumulates=False) == pytest.approx(counted, rel=0.03)
