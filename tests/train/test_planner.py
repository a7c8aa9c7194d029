"""The memory planner: predictions against counts by hand, torch's hooks and the allocator's own
events; and what it chooses under a budget.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from train_helpers import (
    SmallDeviceTask,
    StopAfter,
    ToyTask,
    config,
    grad_norms,
    losses,
    records,
    run,
)

from raypipe.errors import ConfigError, MemoryBudgetExceeded
from raypipe.stream import ArraySource, Cursor, Gatherer
from raypipe.train import TrainConfig, WorkerContext
from raypipe.train.engine import Engine
from raypipe.train.feed import Micro
from raypipe.train.footprint import Footprint, Line, LiveBytes, measure
from raypipe.train.planner import PLAN_FILE, Plan, Prediction, predict
from raypipe.train.techniques import Techniques

CPU = torch.device("cpu")
N, SIDE, WIDTH = 64, 12, 24


class Mlp(nn.Module):
    """6 -> 512 -> 1: small weights, wide activations."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 512), nn.ReLU(), nn.Linear(512, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class ConvBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


class ConvNet(nn.Module):
    """Three blocks and a linear head, on images (b, 4, 12, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, WIDTH, 1)
        self.blocks = nn.ModuleList(ConvBlock(WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Two transformer layers over 36 tokens of 16 channels, on (b, 4, 12, 12)."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.TransformerEncoderLayer(16, 2, 64, 0.1, batch_first=True) for _ in range(2))
        self.blocks = nn.ModuleList(layers)
        self.head = nn.Linear(16, 300)  # a gradient that is larger than a few rows' activations

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1).unflatten(1, (36, 16))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1)).mean(1, keepdim=True)


MODELS = {"mlp": Mlp, "conv": ConvNet, "attention": Attention}


@dataclass(frozen=True)
class ImageTask:
    """y (1,) float32 from x float32, by one of MODELS."""

    data: Path
    model: str

    @property
    def train_rows(self) -> np.ndarray:
        return np.arange(N - 4)

    @property
    def val_rows(self) -> np.ndarray:
        return np.arange(N - 4, N)

    def build_model(self) -> nn.Module:
        return MODELS[self.model]()

    def sources(self) -> Mapping[str, ArraySource]:
        x = "flat" if self.model == "mlp" else "images"
        return {k: ArraySource.npy(self.data / f"{n}.npy") for k, n in (("x", x), ("y", "y"))}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return (model(batch["x"]).float() - batch["y"]).square().mean(1)

    def val_sums(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"loss": self.loss(model, batch).sum()}

    def val_metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {"val_loss": float(sums["loss"])}

    def checkpoint_blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return list(getattr(model, "blocks", ()))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors on many threads take longer than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(1)
    np.save(folder / "images.npy", rng.standard_normal((N, 4, SIDE, SIDE)).astype(np.float32))
    np.save(folder / "flat.npy", rng.standard_normal((N, 6)).astype(np.float32))
    np.save(folder / "y.npy", rng.standard_normal((N, 1)).astype(np.float32))
    return folder


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


def made_up(world: int = 1, **options: Any) -> Plan:
    """fp32 100 + 10 a row; channels_last the same; checkpointing 120 + 4; AMP 90 + 6; all 100 + 2."""
    lines = {
        Techniques(): (100, 10),
        Techniques(channels_last=True): (100, 10),
        Techniques(checkpointing=True): (120, 4),
        Techniques(amp="bf16"): (90, 6),
        Techniques("bf16", True, True): (100, 2),
    }
    predictions = tuple(
        Prediction(
            techniques=techniques,
            footprint=Footprint(
                static_bytes=40,
                phases={"first": (Line(fixed - 40, a_row),), "more": (Line(fixed - 35, a_row),)},
            ),
        )
        for techniques, (fixed, a_row) in lines.items()
    )
    return Plan(asked=config(**options), device="cpu", world=world, predictions=predictions)


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


def test_fit_takes_the_choice_and_trains_the_same_steps(toy: ToyTask, tmp_path: Path) -> None:
    run(toy, config(), tmp_path / "plain")
    plan = predict(toy, config(), CPU)
    fp32 = plan.predictions[0]
    smallest = min(plan.peak_bytes(p, 8) for p in plan.predictions if p.footprint)
    budget = min(plan.peak_bytes(fp32, 2), smallest - 1)  # nothing holds 8 rows: fewer it must be
    said: list[str] = []
    cfg = config(fit_gpu=str(budget) + "B")
    run(toy, cfg, tmp_path / "ours", say=said.append)
    saved = json.loads((tmp_path / "ours" / PLAN_FILE).read_text())
    chosen = saved["chosen"]
    assert chosen["predicted_peak_bytes"] <= budget == chosen["budget_bytes"]
    assert chosen["batch_size"] * chosen["accumulate"] == 8 > chosen["batch_size"]
    assert saved["peak_bytes"]["fp32"] == plan.peak_bytes(fp32, 8)
    assert "--fit-gpu" in said[0] and "micro batches of" in said[0]
    tolerance = 1e-5 if chosen["amp"] == "off" else 0.03
    assert losses(tmp_path / "ours") == pytest.approx(losses(tmp_path / "plain"), rel=tolerance)
    norms = [grad_norms(tmp_path / name)[:5] for name in ("ours", "plain")]
    assert norms[0] == pytest.approx(norms[1], rel=max(1e-4, 2 * tolerance))
    rows = [r["rows"] for r in records(tmp_path / "ours") if r["kind"] == "step"]
    assert rows == [8, 8, 8, 8, 8, 3] * 3


def test_a_resumed_run_keeps_the_amp_that_was_chosen(toy: ToyTask, tmp_path: Path) -> None:
    run(toy, config(amp="bf16"), tmp_path / "run", should_stop=StopAfter(3))
    run(toy, config(fit_gpu="1GiB"), tmp_path / "run", should_stop=StopAfter(3))
    chosen = json.loads((tmp_path / "run" / PLAN_FILE).read_text())["chosen"]
    assert (chosen["amp"], chosen["batch_size"]) == ("bf16", 8)
    with pytest.raises(ConfigError, match="amp 'bf16' -> 'off'"):
        run(toy, config(), tmp_path / "run")


def test_a_budget_below_everything_stops_before_the_first_step(
    toy: ToyTask, tmp_path: Path
) -> None:
    with pytest.raises(MemoryBudgetExceeded, match="need at least"):
        run(toy, config(fit_gpu="1KB"), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_table_can_be_left_out(toy: ToyTask, tmp_path: Path) -> None:
    said: list[str] = []
    run(toy, config(predict_memory=True), tmp_path / "a", say=said.append)
    run(toy, config(), tmp_path / "b", say=said.append)
    assert "memory of a step" in said[0] and "memory of a step" not in said[1]
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


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
