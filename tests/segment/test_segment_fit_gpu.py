"""What --fit-gpu knows of a U-Net on a machine without GPU: shapes alone, held against steps that are
really computed, and the choices that come of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from unet_bench import unet_memory

from raypipe.segment.config import InputConfig, NetworkConfig, SegmentFitConfig
from raypipe.segment.model import UNetConfig
from raypipe.segment.planted import PlantedNucleiConfig, make_planted_nuclei
from raypipe.segment.prepare import prepare
from raypipe.train import TrainConfig, footprint
from raypipe.train.footprint import LiveBytes, measure
from raypipe.train.planner import Plan, predict

BENCH = unet_memory()
CPU = torch.device("cpu")
SPEC = UNetConfig(width=8, depth=3)
ROWS, SIDE = 12, 32


@pytest.fixture(autouse=True, scope="module")
def shapes_of_small_rows() -> Iterator[None]:
    """Else these rows would be computed."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(footprint, "SHAPES_FROM", 0)
        yield


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return BENCH.make_task(tmp_path_factory.mktemp("task"), SPEC, (ROWS, SIDE, SIDE))


def really(task: Any, cfg: TrainConfig, rows: int) -> int:
    """The most that a step of ``rows`` rows holds: real tensors, watched as they come and go."""
    engine, batch = BENCH.engine_and_batch(task, cfg, "cpu")
    batch = {name: tensor[:rows] for name, tensor in batch.items()}
    BENCH.step(engine, batch)  # the moments come into being
    moments = [t for state in engine.optimizer.state.values() for t in state.values()]
    there = [*engine.module.parameters(), *engine.module.buffers(), *moments]
    with LiveBytes(CPU, [*there, *batch.values()]) as live:
        BENCH.step(engine, batch)
    return int(live.taken_timeline().max()) + sum(tensor.nbytes for tensor in there)


@pytest.mark.parametrize("name", BENCH.SETS)
def test_shapes_alone_foretell_a_step_that_is_computed(task: Any, name: str) -> None:
    cfg = TrainConfig(**BENCH.SETS[name])
    found = measure(task, cfg, CPU)
    assert found.ran == "" and found.aligned
    training = {phase: lines for phase, lines in found.phases.items() if phase != "validate"}
    alone = replace(found, phases=training, batch_row_bytes=0)
    foretold = alone.peak_bytes(ROWS, accumulates=False)
    assert foretold == pytest.approx(really(task, cfg, ROWS), rel=0.01)


@pytest.fixture(scope="module")
def plan(task: Any) -> Plan:
    return predict(task, TrainConfig(batch_size=ROWS), CPU)


@pytest.mark.parametrize("part", [0.3, 0.5, 0.7, 1.1])
def test_what_is_chosen_fits_when_it_is_computed(task: Any, plan: Plan, part: float) -> None:
    """Budgets as parts of what the plain step of all rows really takes."""
    budget = int(part * really(task, plan.asked, ROWS))
    choice = plan.choose(budget)
    assert choice.cfg.batch_size * choice.cfg.accumulate == ROWS
    assert really(task, choice.cfg, choice.cfg.batch_size) <= choice.peak_bytes <= budget
    assert (choice.name == "fp32") == (part > 1)


@dataclass(frozen=True)
class Looking(BENCH.UNetTask):  # type: ignore[misc, name-defined]
    """Asks for a value in each step, as a model with a branch in it does."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return super().loss(model, batch) * (2 if bool(batch["image"].max() > 5) else 1)


def test_a_task_that_looks_at_values_is_run_for_real(task: Any) -> None:
    looking = measure(Looking(task.folder, SPEC, ROWS), TrainConfig(), CPU)
    assert "DataDependent" in looking.ran
    plain = measure(task, TrainConfig(), CPU)
    for rows in (2, 50):
        wanted = plain.peak_bytes(rows, accumulates=True)
        assert looking.peak_bytes(rows, accumulates=True) == pytest.approx(wanted, rel=0.01)
    said = predict(Looking(task.folder, SPEC, ROWS), TrainConfig(), CPU).lines()[0]
    assert "measured at 2 and 3 rows on cpu by real steps (DataDependent" in said


@dataclass(frozen=True)
class Checking(BENCH.UNetTask):  # type: ignore[misc, name-defined]
    """Has a check of its own, which tensors without values do not pass; ``only`` under one technique."""

    error: type[BaseException] = AssertionError
    only: str = ""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        found = super().loss(model, batch)
        if isinstance(batch["image"], FakeTensor) and (
            not self.only or torch.is_autocast_enabled("cpu")
        ):
            raise self.error("the image is\nnot as it should be")
        return found


@pytest.mark.parametrize("error", [AssertionError, AttributeError, IndexError, KeyError, OSError])
def test_a_check_of_the_models_own_is_tried_on_real_steps(task: Any, error: type) -> None:
    checking = measure(Checking(task.folder, SPEC, ROWS, error=error), TrainConfig(), CPU)
    assert error.__name__ in checking.ran and "not as it should be" in checking.ran
    wanted = measure(task, TrainConfig(), CPU).peak_bytes(8, accumulates=True)
    assert checking.peak_bytes(8, accumulates=True) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, KeyboardInterrupt])
def test_memory_and_the_user_are_no_checks(task: Any, error: type[BaseException]) -> None:
    with pytest.raises(error, match="not as it should be"):
        measure(Checking(task.folder, SPEC, ROWS, error=error), TrainConfig(), CPU)


def test_what_was_counted_is_not_called_measured(task: Any, plan: Plan) -> None:
    assert plan.lines()[0].startswith(
        "memory of a step, counted at 2 and 3 rows on cpu by shapes alone;"
    )
    assert not any("measured" in line for line in plan.lines())
    mixed = predict(Checking(task.folder, SPEC, ROWS, only="amp"), TrainConfig(), CPU).lines()
    assert "counted at 2 and 3 rows on cpu by shapes alone, but for sets" in mixed[0]
    measured = [line for line in mixed if "measured by real steps: AssertionError" in line]
    assert measured and all(line.startswith("  AMP ") for line in measured)


@pytest.mark.parametrize("target", ["foreground", "boundary"])
@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_the_rooms_own_task_needs_no_values(tmp_path: Path, target: Any, amp: Any) -> None:
    planted = PlantedNucleiConfig(n_train=2, n_val=1, n_test=1, size=64)
    cfg = SegmentFitConfig(
        run_dir=tmp_path / "run",
        inputs=InputConfig(data=make_planted_nuclei(tmp_path, planted), crop=32, target=target),
        network=NetworkConfig(width=4, depth=2),
    )
    train = TrainConfig(amp=amp, clip_norm=1.0, ema_decay=0.9)
    assert measure(prepare(cfg).task, train, CPU).ran == ""


@pytest.mark.slow
def test_the_default_network_is_planned_within_a_minute(tmp_path: Path) -> None:
    shape = (8, 512, 512)
    task = BENCH.make_task(tmp_path, UNetConfig(), shape)
    started = time.process_time()
    plan = predict(task, TrainConfig(batch_size=8), CPU)
    choice = plan.choose(12 << 30)
    assert time.process_time() - started < 60
    assert choice.peak_bytes <= 12 << 30
    cfg = choice.cfg
    options = {k: getattr(cfg, k) for k in ("amp", "checkpointing", "channels_last")}
    counted = BENCH.count((cfg.batch_size, *shape[1:]), options).peak
    # The plan has two Gatherers' rings of batches, too, and validation.
    rings = 4 * cfg.batch_size * (4 + 1) * int(np.prod(shape[1:]))
    assert counted <= choice.peak_bytes <= 1.03 * (counted + rings)
