"""What the memory techniques save on a U-Net (64 to 1024 channels), and what they cost in time.

Counted on tensors without memory (`raypipe.train.shapes`, of any size on any machine), by the counter
of the memory planner (`raypipe.train.footprint.LiveBytes`), each storage once, over one training step that
is prepared by the loop's own sequence (`raypipe.train.precision.prepare`): what the forward leaves
for the backward, and the step's highest point with weights, gradients and AdamW's moments.
``hooks`` beside it is what torch's own saved-tensor hooks see; of a recomputed block they see
nothing, so only the first two sets have them.

Keys, 512x512 pixels, batch 8 (and with _384x512_b16 after them, batch 16):
act_gib_fp32, act_gib_amp, act_gib_ckpt, act_gib_all : kept for the backward
peak_gib_...  : the step's highest point;  all_to_fp32 : of these the last over the first
act_all_to_fp32 : the same of what is kept
hooks_gib_fp32, hooks_gib_amp : by torch's hooks
ckpt_slowdown_percent : measured steps with checkpointing over steps without, taken in turn, on this
    machine's device (CPU: one thread and a smaller network, WIDTH, DEPTH, SIDE, BATCH below)
Where CUDA is at hand: cuda_predicted_gib_..., cuda_measured_gib_... (the planner's prediction from
2 and 3 rows, and the allocator's peak at the real batch), cuda_off_percent (the worst of them),
cuda_step_s_...; where not, a key says so.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import emit, median, parser, say
from torch import Tensor, nn

from raypipe.segment.loss import segmentation_loss
from raypipe.segment.model import UNet, UNetConfig, build_model, checkpoint_blocks
from raypipe.stream import ArraySource, Cursor
from raypipe.train import TrainConfig, WorkerContext
from raypipe.train.engine import Engine
from raypipe.train.feed import Micro
from raypipe.train.footprint import LiveBytes, measure
from raypipe.train.precision import prepare
from raypipe.train.shapes import Shapes
from raypipe.units import format_bytes

SHAPES = {"": (8, 512, 512), "_384x512_b16": (16, 384, 512)}
SETS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "amp": {"amp": "bf16"},
    "ckpt": {"checkpointing": True},
    "all": {"amp": "bf16", "checkpointing": True, "channels_last": True},
}
GIB = 2**30
# Of the measured run on a CPU: small enough for a step of a second.
WIDTH, DEPTH, SIDE, BATCH = 32, 5, 128, 2
ROUNDS = 11


@dataclass(frozen=True)
class Counted:
    """Bytes of one step: kept after the forward, seen by torch's hooks, and at the highest point."""

    kept: int
    hooks: int
    peak: int


def count(
    shape: tuple[int, int, int], options: Mapping[str, Any], spec: UNetConfig | None = None
) -> Counted:
    """One step on images ``shape`` (batch, height, width) without values, with ``options`` of
    TrainConfig.
    """
    cfg = TrainConfig(**options)
    model = UNet(spec or UNetConfig())
    blocks = checkpoint_blocks(model) if cfg.checkpointing else ()
    prepared = prepare(model, blocks, cfg, WorkerContext(run_dir=Path()))
    shapes = Shapes()
    shapes.drop_values(model)
    with shapes:
        optimizer = torch.optim.AdamW(model.parameters())
        batch = prepared.place({"image": torch.rand(shape[0], 1, *shape[1:])})
        mask = torch.zeros(shape, dtype=torch.uint8)
        for p in model.parameters():  # so that the moments are there from the start
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        moments = [t for state in optimizer.state.values() for t in state.values()]
        static = [*model.parameters(), *model.buffers(), *moments, batch["image"], mask]
        saved = SavedBytes(static)
        with LiveBytes(torch.device("cpu"), static) as live:
            with saved.hooks(), prepared.autocast():
                loss = segmentation_loss(prepared.model(batch["image"]), mask)
            kept = live.live_bytes
            loss.mean().backward()
            optimizer.step()
            top = int(live.taken_timeline().max())
    gc.collect()  # recomputed blocks refer to themselves
    return Counted(kept, saved.n_bytes, top + sum(t.nbytes for t in static))


class SavedBytes:
    """Bytes of the storages that autograd saved, each once, without those of ``known``."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        self.n_bytes = 0
        self._seen = {t.untyped_storage()._cdata for t in known}
        self._held: list[Tensor] = []  # or another storage may get the same address

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.n_bytes += storage.nbytes()
        return tensor


@dataclass(frozen=True)
class UNetTask:
    """``raypipe.train.Task``: one foreground, from files of images and masks; ``rows`` of them train."""

    folder: Path
    spec: UNetConfig
    rows: int

    @property
    def train_rows(self) -> np.ndarray:
        return np.arange(self.rows)

    @property
    def val_rows(self) -> np.ndarray:
        return np.arange(1)

    def build_model(self) -> nn.Module:
        return build_model(self.spec)

    def sources(self) -> Mapping[str, ArraySource]:
        return {n: ArraySource.npy(self.folder / f"{n}.npy") for n in ("image", "mask")}

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return segmentation_loss(model(batch["image"]), batch["mask"])

    def val_sums(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"loss": self.loss(model, batch).sum()}

    def val_metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return {"val_loss": float(sums["loss"])}

    def checkpoint_blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return checkpoint_blocks(model)


def make_task(folder: Path, spec: UNetConfig, shape: tuple[int, int, int]) -> UNetTask:
    rng = np.random.default_rng(0)
    batch, height, width = shape
    np.save(folder / "image.npy", rng.random((batch, 1, height, width), np.float32))
    np.save(folder / "mask.npy", rng.integers(0, 2, (batch, height, width), np.uint8))
    return UNetTask(folder, spec, batch)


def step(engine: Engine, batch: dict[str, Tensor]) -> float:
    """Seconds of one whole step; on a CPU those of its own thread, which a neighbour takes little of."""
    rows, device = np.arange(len(batch["mask"])), engine.ctx.torch_device
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    _wait(device)
    started = clock()
    engine.backward(Micro(Cursor(), len(rows), rows, len(rows), True), batch)
    engine.update(1e-4)
    _wait(device)
    return clock() - started


def engine_and_batch(
    task: UNetTask, cfg: TrainConfig, device: str
) -> tuple[Engine, dict[str, Tensor]]:
    engine = Engine(task, cfg, WorkerContext(run_dir=Path(), device=device))
    engine.module.train()
    files = task.sources()
    batch = {name: torch.from_numpy(np.load(task.folder / f"{name}.npy")) for name in files}
    return engine, {name: tensor.to(device) for name, tensor in batch.items()}


def slowdown(folder: Path, device: str) -> float:
    """Median over rounds of (step with checkpointing) / (step without) - 1, in percent."""
    on_cuda = device.startswith("cuda")
    torch.set_num_threads(1)
    spec = UNetConfig() if on_cuda else UNetConfig(width=WIDTH, depth=DEPTH)
    shape = SHAPES[""] if on_cuda else (BATCH, SIDE, SIDE)
    task = make_task(folder, spec, shape)
    pair = [engine_and_batch(task, TrainConfig(checkpointing=on), device) for on in (False, True)]
    for engine, batch in pair:
        step(engine, batch)
    ratios = []
    for _ in range(ROUNDS):
        plain, checkpointed = (step(engine, batch) for engine, batch in pair)
        ratios.append(checkpointed / plain)
        say(f"step {plain:.2f} s, with checkpointing {checkpointed:.2f} s")
    return 100 * (median(ratios) - 1)


def on_cuda(
    folder: Path,
    shape: tuple[int, int, int],
    spec: UNetConfig | None = None,
    device: str = "cuda",
) -> dict[str, float]:
    """Predicted and measured peaks, and step times, at the real size."""
    found: dict[str, float] = {}
    off, task = 0.0, make_task(folder, spec or UNetConfig(), shape)
    for name, options in SETS.items():
        cfg = TrainConfig(batch_size=task.rows, **options)
        predicted = measure(task, cfg, torch.device(device))
        # The batches of a gatherer and the validation are the loop's; here is one step alone.
        training = {k: v for k, v in predicted.phases.items() if k != "validate"}
        alone = replace(predicted, phases=training, batch_row_bytes=0)
        engine, batch = engine_and_batch(task, cfg, device)
        step(engine, batch)
        torch.cuda.reset_peak_memory_stats()
        seconds = median([step(engine, batch) for _ in range(ROUNDS)])
        peak = torch.cuda.max_memory_allocated()
        foretold = alone.peak_bytes(task.rows, accumulates=False)
        foretold += sum(t.nbytes for t in batch.values())
        off = max(off, 100 * abs(foretold / peak - 1))
        found |= {
            f"cuda_predicted_gib_{name}": round(foretold / GIB, 2),
            f"cuda_measured_gib_{name}": round(peak / GIB, 2),
            f"cuda_step_s_{name}": round(seconds, 4),
        }
        say(f"{name}: {format_bytes(foretold)} predicted, {format_bytes(peak)} measured")
        del engine, batch
        gc.collect()
        torch.cuda.empty_cache()
    return {**found, "cuda_off_percent": round(off, 1)}


def counted_metrics() -> dict[str, float]:
    """The keys that need no device."""
    metrics: dict[str, float] = {}
    for suffix, shape in SHAPES.items():
        found = {name: count(shape, options) for name, options in SETS.items()}
        for name, counted in found.items():
            metrics[f"act_gib_{name}{suffix}"] = round(counted.kept / GIB, 3)
            metrics[f"peak_gib_{name}{suffix}"] = round(counted.peak / GIB, 3)
            if name in ("fp32", "amp"):
                metrics[f"hooks_gib_{name}{suffix}"] = round(counted.hooks / GIB, 3)
            say(f"{shape} {name}: {counted.kept / GIB:.2f} GiB kept, {counted.peak / GIB:.2f} peak")
        last, first = found["all"], found["fp32"]
        metrics[f"all_to_fp32{suffix}"] = round(last.peak / first.peak, 3)
        metrics[f"act_all_to_fp32{suffix}"] = round(last.kept / first.kept, 3)
    return metrics


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--no-steps", action="store_true", help="count only; measure no step")
    options = args.parse_args()
    metrics: dict[str, object] = dict(counted_metrics())
    cuda = torch.cuda.is_available()
    if not options.no_steps:
        with tempfile.TemporaryDirectory() as tmp:
            percent = slowdown(Path(tmp), "cuda" if cuda else "cpu")
            metrics["ckpt_slowdown_percent"] = round(percent, 1)
            metrics["slowdown_on"] = (
                "cuda" if cuda else f"cpu, width {WIDTH}, {SIDE} px, batch {BATCH}"
            )
            if cuda:
                metrics |= on_cuda(Path(tmp), SHAPES[""])
            else:
                metrics["cuda"] = "no CUDA device here: not measured"
    emit("unet_memory", metrics, options.json)


if __name__ == "__main__":
    main()
