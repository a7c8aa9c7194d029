"""A step's memory: predictions against counts by hand, torch's hooks and the allocator's own events."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_tasks import ImageTask
from torch import Tensor
from train_helpers import config, run

from raypipe.stream import Cursor, Gatherer
from raypipe.train import TrainConfig, WorkerContext
from raypipe.train.engine import Engine
from raypipe.train.feed import Micro
from raypipe.train.footprint import Footprint, LiveBytes, measure
from raypipe.train.planner import predict

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def engine_of(task: Any, cfg: TrainConfig, device: str = "cpu") -> Engine:
    engine = Engine(task, cfg, WorkerContext(run_dir=Path(), device=device))
    engine.module.train()
    return engine


def batch_of(task: Any, rows: int) -> dict[str, Tensor]:
    with Gatherer(task.sources(), rows) as gatherer:
        batch = next(iter(gatherer.batches([np.arange(rows)])))
        return {name: tensor.clone() for name, tensor in batch.items()}


def backward(engine: Engine, batch: dict[str, Tensor]) -> None:
    rows = np.arange(len(batch["y"]))
    engine.backward(Micro(Cursor(), len(rows), rows, len(rows), True), batch)


def training_only(footprint: Footprint) -> Footprint:
    """Without validation and the gatherers' batches, which the counts beside it leave out too."""
    phases = {name: lines for name, lines in footprint.phases.items() if name != "validate"}
    return replace(footprint, phases=phases, batch_row_bytes=0)


def test_an_mlp_counted_by_hand(images: Path) -> None:
    footprint = training_only(measure(ImageTask(images, "mlp"), config(), CPU))
    numbers = 6 * 512 + 512 + 512 + 1
    steps = 4 * 4  # AdamW's counter, a float32 a parameter tensor
    assert footprint.static_bytes == 3 * 4 * numbers + steps
    for rows in (40, 1000):
        # As the hidden layer's gradient is made: relu's output, its gradient and this one, each
        # (rows, 512); beside them the head's gradients and the loss's few numbers a row.
        hidden = 3 * 4 * 512 * rows
        found = footprint.peak_bytes(rows, accumulates=False) - footprint.static_bytes
        assert hidden + 4 * 513 <= found <= hidden + 4 * 513 + 4 * 12 * rows + 64
        # With gradients there already, those of the first layer too.
        more = footprint.peak_bytes(rows, accumulates=True) - footprint.static_bytes
        assert more - found == pytest.approx(4 * 512 * 7, abs=4 * 513 + 64)


def test_the_gradients_decide_at_few_rows_the_activations_at_many(images: Path) -> None:
    footprint = training_only(measure(ImageTask(images, "mlp"), config(clip_norm=None), CPU))
    parameters = 4 * (6 * 512 + 512 + 512 + 1)
    few = footprint.line(1, accumulates=True)
    assert few.fixed >= footprint.static_bytes + parameters
    assert footprint.line(64, accumulates=True).a_row > few.a_row - 1
    peaks = [footprint.peak_bytes(n, accumulates=True) for n in range(1, 65)]
    assert np.diff(peaks, 2).min() >= -2, "a highest line bends upwards"


@pytest.mark.parametrize("model", ["mlp", "conv", "attention"])
def test_what_lives_after_the_forward_is_what_torchs_hooks_saved(images: Path, model: str) -> None:
    task = ImageTask(images, model)
    engine, batch = engine_of(task, config()), batch_of(task, 5)
    there = [*engine.module.parameters(), *engine.module.buffers(), *batch.values()]
    known = {tensor.untyped_storage()._cdata for tensor in there}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in known:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with LiveBytes(CPU, there) as mode, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = task.loss(engine.module, batch)
    kept = {**saved, loss.untyped_storage()._cdata: loss}
    assert mode.live_bytes == sum(t.untyped_storage().nbytes() for t in kept.values())


def allocator_peak(task: Any, cfg: TrainConfig, rows: int, micros: int) -> int:
    """The highest sum of the CPU allocator's own events over one step, and what was there."""
    from torch.profiler import profile

    engine, batch = engine_of(task, cfg), batch_of(task, rows)
    backward(engine, batch)
    engine.update(0.0)
    with profile(profile_memory=True) as profiled:
        for _ in range(micros):
            backward(engine, batch)
        engine.update(0.0)
    kineto = profiled.profiler.kineto_results  # type: ignore[union-attr]
    events = [e for e in kineto.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    live = np.cumsum([event.nbytes() for event in events])
    moments = [t for state in engine.optimizer.state.values() for t in state.values()]
    static = [*engine.module.parameters(), *engine.module.buffers(), *moments]
    return int(live.max()) + sum(tensor.nbytes for tensor in static)


@pytest.mark.filterwarnings("ignore")  # of the profiler, about its own start
@pytest.mark.parametrize("model", ["mlp", "conv", "attention"])
def test_predictions_hold_against_the_allocator_at_20_times_the_batch(
    images: Path, model: str
) -> None:
    task = ImageTask(images, model)
    plan = predict(task, config(), CPU)
    measured = [p for p in plan.predictions if p.footprint]
    assert len(measured) == {"mlp": 2, "conv": 5, "attention": 4}[model]
    for prediction in measured:
        cfg = replace(config(), **asdict(prediction.techniques))
        assert prediction.footprint is not None
        footprint = training_only(prediction.footprint)
        for micros in (1, 2):
            found = allocator_peak(task, cfg, 60, micros)
            foretold = footprint.peak_bytes(60, accumulates=micros > 1)
            # oneDNN reorders images for its convolutions inside its kernels: 8 to 10 % here.
            within = 0.12 if model == "conv" else 0.03
            assert foretold == pytest.approx(found, rel=within), prediction.techniques.name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("model", ["conv", "attention"])
def test_cuda_peaks_are_predicted_within_a_tenth(images: Path, model: str, tmp_path: Path) -> None:
    task, device = ImageTask(images, model), torch.device("cuda:0")
    plan = predict(task, config(batch_size=60), device)
    for prediction in (p for p in plan.predictions if p.footprint):
        cfg = config(batch_size=60, epochs=1, predict_memory=False, **asdict(prediction.techniques))
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run(task, cfg, tmp_path / prediction.techniques.name, device="cuda:0")
        found = torch.cuda.max_memory_allocated(device) - before
        assert prediction.footprint is not None
        foretold = prediction.footprint.peak_bytes(60, accumulates=False)
        assert foretold == pytest.approx(found, rel=0.1), prediction.techniques.name
