"""How much memory a worker of a plan takes at its peak, known before a tile is computed.

The model runs on two small images while the bytes that live at once are counted: they grow with the
pixels, operation by operation. Windows and results follow from the grid; what the process holds anyway
is read off this one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from raypipe.errors import MemoryBudgetExceeded
from raypipe.memory.policy import Limits
from raypipe.memory.probe import charge_bytes
from raypipe.runner import LocalRunner, Prospect, Runner
from raypipe.tile.engine import BLOCK
from raypipe.tile.plan import TilePlan
from raypipe.tile.probe import Probe, dtype_of
from raypipe.tile.worker import After
from raypipe.units import format_bytes

# The kernels that oneDNN compiles, and the arenas of threads. Without it three U-Nets on a CPU, of width
# 8, 16 and 64, peaked 42, 27 and 48 MiB above what is counted; with it none did.
KERNEL_BYTES = 48 << 20
# A worker process before the weights, at most: torch and Ray loaded take some 300 MiB. The process that
# asks may be a notebook that holds much more.
WORKER_BYTES = 512 << 20


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Bytes of one worker that computes ``batch`` windows at once.

    base : a process with the libraries and the weights; windows : read, read ahead and prepared;
    network : at work; results : being written, and blended; on_gpu : network, weights and one batch lie
    there
    """

    batch: int
    base: int
    weights: int
    windows: int
    network: int
    results: int
    on_gpu: bool

    @property
    def host_bytes(self) -> int:
        """The peak that is held against the worker's budget."""
        work = self.windows + self.results + (0 if self.on_gpu else self.network)
        return self.base + KERNEL_BYTES + work

    def words(self, budget_bytes: int) -> str:
        """In one line."""
        share = self.host_bytes / budget_bytes
        text = (
            f"predicted peak {format_bytes(self.host_bytes)} a worker process, {share:.0%} of its budget of "
            f"{format_bytes(budget_bytes)}: {format_bytes(self.base + KERNEL_BYTES)} libraries and weights, "
            f"{format_bytes(self.windows + self.results)} windows and results"
        )
        if not self.on_gpu:
            return f"{text}, {format_bytes(self.network)} the network at work"
        gpu = format_bytes(self.weights + self.windows // 2 + self.network)
        return f"{text}; {gpu} on the GPU, without CUDA's own"


def forecast(
    plan: TilePlan, device: str, batch: int | None = None, *, apart: bool = False
) -> Forecast:
    """Of a worker on ``device``, which is this process, or another (``apart``).

    batch : windows at once, as ``plan`` says
    """
    batch, model = batch or plan.cfg.batch, plan.model
    after = plan.after if plan.cfg.blend is None else None
    network, channels = live_bytes(model, (batch, *plan.window_shape), after)
    weights = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    return Forecast(
        batch=batch,
        base=min(charge_bytes(), WORKER_BYTES + weights) if apart else charge_bytes(),
        weights=weights,
        windows=_window_bytes(plan, batch),
        network=network,
        results=_result_bytes(plan, batch, channels),
        on_gpu=not device.startswith("cpu"),
    )


def live_bytes(
    model: nn.Module, shape: tuple[int, ...], after: After | None = None
) -> tuple[int, int]:
    """(most bytes of tensors that live at once while ``model`` maps a batch of ``shape``, channels of its
    result); without the batch, the weights, and what kernels take inside themselves.

    What grows faster than the pixels, as attention does, is taken for less than it is. Raises as
    `Probe.of`.
    """
    batch, channels_in, *space = shape
    with Probe.of(model, channels_in, len(space)) as probe:
        pixels = [length * probe.base ** (len(space) - 1) for length in _lengths(probe)]
        (few, channels), (more, _) = (_timeline(probe, n, after) for n in _lengths(probe))
    if len(few) != len(more):  # it took another way through the model: a line through the two peaks
        few, more = few.max(keepdims=True), more.max(keepdims=True)
    slopes = (more - few) / (pixels[1] - pixels[0])
    fixed = few - slopes * pixels[0]
    return round(float(np.max(fixed + slopes * batch * math.prod(space)))), channels


def _lengths(probe: Probe) -> tuple[int, int]:
    return 2 * probe.base, 3 * probe.base


def _timeline(probe: Probe, length: int, after: After | None) -> tuple[np.ndarray, int]:
    """(bytes that live after each operation (operations,), channels of the result)."""
    from raypipe.train.footprint import LiveBytes

    image, model = probe.image(0, length), probe.model
    mode = LiveBytes(image.device, [image, *model.parameters(), *model.buffers()])
    with mode:
        out = model(image)
        channels = int(out.shape[1])
        if after is not None:
            out = after(out)
    return mode.taken_timeline(), channels


def _window_bytes(plan: TilePlan, batch: int) -> int:
    """The batch at work, the one that is read ahead, and one window while it is prepared."""
    wide = 8 if dtype_of(plan.model) == torch.float64 else 4
    one = math.prod(plan.window_shape) * wide
    raw = plan.source.channels * math.prod(plan.grid.window) * plan.source.dtype.itemsize
    return 2 * batch * one + 2 * (one + raw)


def _result_bytes(plan: TilePlan, batch: int, channels: int) -> int:
    """Two batches' results and a tile of them; when blending, an item's block and what becomes of it."""
    itemsize = np.dtype(plan.spec.dtype).itemsize
    tile = math.prod(min(axis.tile, axis.size) for axis in plan.grid.axes)
    tile *= plan.spec.channels * itemsize
    window = math.prod(plan.grid.window)
    if plan.cfg.blend is None:
        return 2 * batch * window * plan.spec.channels * itemsize + tile
    block = math.prod(min(BLOCK * axis.tile, axis.size) for axis in plan.grid.axes)
    # float32 sums, the block before that is being written, and one window weighed.
    return block * (4 * channels + 2 * plan.spec.channels * itemsize) + 3 * window * channels * 4


def budget_of(runner: Runner | Prospect, workers: int) -> int:
    """Bytes that each of ``workers`` may hold; those that meet on one machine share its memory."""
    config = runner.memory.config
    if isinstance(runner, LocalRunner):
        return config.budget_bytes
    cores = runner.machines.cores_for(workers)
    share = config.capacity_bytes(runner.memory.limits) // runner.machines.together(workers, cores)
    return min(config.budget_bytes, share)


def is_known(runner: Runner | Prospect) -> bool:
    """Whether ``budget_of`` says what workers get. On a cluster that was joined each has a share of the
    node it comes to, which only that node knows.
    """
    return isinstance(runner, LocalRunner) or not runner.machines.grows


def require_memory(plan: TilePlan, device: str, budget_bytes: int, *, apart: bool = False) -> None:
    """Raises MemoryBudgetExceeded when one window alone outgrows a worker, naming tiles that fit."""
    limit = Limits.of(budget_bytes).hard_bytes
    need = forecast(plan, device, batch=1, apart=apart).host_bytes
    if need <= limit:
        return
    fits = _that_fits(plan, device, limit, apart)
    step = f"take --chunk-size {fits}, or" if fits else "it takes"
    raise MemoryBudgetExceeded(
        f"chunk_size {plan.cfg.chunk_size}: one window of {'x'.join(map(str, plan.grid.window))} pixels "
        f"needs {format_bytes(need)} in a worker, which is stopped at {format_bytes(limit)} of its budget "
        f"of {format_bytes(budget_bytes)}; {step} a larger --max-memory-per-process"
    )


def _that_fits(plan: TilePlan, device: str, limit: int, apart: bool) -> int | None:
    """The largest half, quarter, ... of the longest tile that fits; None when none does."""
    chunk = min(plan.cfg.chunk_size, max(plan.grid.shape))
    least = max(plan.field.align)
    if plan.cfg.blend is not None:  # windows overlap by half a tile at most, in multiples of align
        least = max(2 * axis.halo for axis in plan.grid.axes)
    while (chunk := chunk // 2) >= least:
        if forecast(plan.resized(chunk), device, batch=1, apart=apart).host_bytes <= limit:
            return chunk
    return None
